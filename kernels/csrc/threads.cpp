#include "threads.h"

#include <dlfcn.h>
#if defined(__linux__)
#include <link.h>
#endif
#include <unistd.h>

#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

namespace {

typedef void (*Body)(void* context, int part, int parts);

// The three entry points of an OpenMP runtime that is already in the process. Their interface is
// the one that compilers emit calls to, so it does not change; we link to no runtime.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
};

#if defined(__linux__)
// torch's own copy if there is one, else any.
int find_runtime(dl_phdr_info* info, size_t, void* found) {
  const char* name = info->dlpi_name;
  if (!std::strstr(name, "libgomp") && !std::strstr(name, "libomp") &&
      !std::strstr(name, "libiomp5"))
    return 0;
  const char** best = static_cast<const char**>(found);
  if (!*best || std::strstr(name, "torch")) *best = name;
  return std::strstr(name, "torch") != nullptr;
}

OpenMP find_openmp() {
  const char* name = nullptr;
  dl_iterate_phdr(find_runtime, &name);
  OpenMP openmp;
  void* library = name ? dlopen(name, RTLD_LAZY | RTLD_NOLOAD) : nullptr;
  if (!library) return openmp;
  openmp.thread_num = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_thread_num"));
  openmp.num_threads = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_num_threads"));
  if (openmp.thread_num && openmp.num_threads)
    openmp.parallel = reinterpret_cast<decltype(openmp.parallel)>(dlsym(library, "GOMP_parallel"));
  return openmp;
}
#else
OpenMP find_openmp() { return {}; }
#endif

const OpenMP& openmp() {
  static const OpenMP runtime = find_openmp();
  return runtime;
}

// Workers that sleep between calls. One call at a time: a second one runs on its caller alone.
class Pool {
 public:
  // Never destroyed: at exit its threads may still be asleep on its members.
  static Pool& instance() {
    static Pool* pool = new Pool;
    if (pool->owner_ != getpid()) pool = new Pool;  // threads do not survive a fork
    return *pool;
  }

  void run(int threads, Body body, void* context) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) return body(context, 0, 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1)
        workers_.emplace_back(&Pool::work, this, static_cast<int>(workers_.size()) + 1, turn_);
      body_ = body, context_ = context, parts_ = threads, left_ = threads - 1;
      ++turn_;
    }
    wake_.notify_all();
    body(context, 0, threads);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return left_ == 0; });
  }

 private:
  void work(int part, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return turn_ != seen; });
      seen = turn_;
      if (part >= parts_) continue;
      const Body body = body_;
      void* const context = context_;
      const int parts = parts_;
      lock.unlock();
      body(context, part, parts);
      lock.lock();
      if (--left_ == 0) done_.notify_one();
    }
  }

  const pid_t owner_ = getpid();
  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Body body_ = nullptr;
  void* context_ = nullptr;
  int parts_ = 0, left_ = 0;
  uint64_t turn_ = 0;
};

struct OpenMPCall {
  Body body;
  void* context;
};

void openmp_part(void* data) {
  const OpenMPCall* call = static_cast<const OpenMPCall*>(data);
  call->body(call->context, openmp().thread_num(), openmp().num_threads());
}

}  // namespace

void run_parallel(int threads, Body body, void* context) {
  if (threads <= 1) return body(context, 0, 1);
  if (!openmp().parallel) return Pool::instance().run(threads, body, context);
  OpenMPCall call{body, context};
  openmp().parallel(openmp_part, &call, static_cast<unsigned>(threads), 0);
}

const char* thread_pool_name() { return openmp().parallel ? "openmp" : "own"; }
