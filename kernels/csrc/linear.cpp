#include "linear.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(PRUNE_LLM_X86)
#include <cpuid.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

#include "threads.h"

namespace {

#if defined(PRUNE_LLM_X86)
bool can_run_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("bmi2");
}

bool can_run_avx512vbmi2() { return can_run_avx512() && __builtin_cpu_supports("avx512vbmi2"); }

bool can_run_avx512bf16() {
  return can_run_avx512vbmi2() && __builtin_cpu_supports("avx512bf16");
}

// AMD's family 26 and later ones.
bool is_zen5() {
  unsigned signature, unused[3];
  if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &signature, unused, unused + 1, unused + 2))
    return false;
  const unsigned family = signature >> 8 & 15;
  return family == 15 && family + (signature >> 20 & 255) >= 26;
}

// The table of avx512bf16 with the channels of isa_zen5.cpp.
const Isa* isa_zen5() {
  static const Isa table = [] {
    Isa found = *isa_avx512bf16();
    found.name = "zen5";
    found.channels[kBF16] = *channels_zen5();
    return found;
  }();
  return &table;
}

// Every processor with AVX2 and FMA has F16C.
bool can_run_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("popcnt");
}
#endif

// The row where part `part` of `parts` begins: parts have about the same number of bytes to read.
int64_t split_row(const Weight& w, int part, int parts) {
  const auto bytes_before = [&w](int64_t row) {
    return (w.bitmask ? row_start(&w, row) : row * w.in_features) * 2 + row * mask_pitch(&w);
  };
  const int64_t target = bytes_before(w.out_features) / parts * part;
  int64_t low = 0, high = w.out_features;
  if (part == parts) return high;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (bytes_before(middle) < target) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Prepared inputs of the calling thread; grows, and is freed with the thread.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  void* get(size_t bytes) {
    if (bytes <= size_) return data_;
    std::free(data_);
    size_ = (bytes + 4095) / 4096 * 4096;
    data_ = std::aligned_alloc(64, size_);
    if (!data_) {
      size_ = 0;
      throw std::bad_alloc();
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

thread_local Scratch scratch;

int64_t popcount_row(const uint8_t* bytes, int64_t count) {
  int64_t total = 0, at = 0;
  for (; at + 8 <= count; at += 8) {
    uint64_t word;
    __builtin_memcpy(&word, bytes + at, 8);
    total += __builtin_popcountll(word);
  }
  for (; at < count; ++at) total += __builtin_popcount(bytes[at]);
  return total;
}

Check check_offsets(const Weight& w) {
  if (!w.offsets) return {Fault::none, 0, 0, 0};
  if (row_start(&w, 0) != 0) return {Fault::offsets_start, 0, 0, row_start(&w, 0)};
  for (int64_t row = 0; row < w.out_features; ++row) {
    const int64_t next = row_start(&w, row + 1);
    if (next < row_start(&w, row) || next > w.nnz)
      return {Fault::offsets_order, row, row_start(&w, row), next};
  }
  if (row_start(&w, w.out_features) != w.nnz)
    return {Fault::offsets_end, w.out_features, w.nnz, row_start(&w, w.out_features)};
  return {Fault::none, 0, 0, 0};
}

Check check_row(const Weight& w, int64_t row) {
  const int64_t pitch = mask_pitch(&w);
  const uint8_t* mask = w.bitmask + row * pitch;
  if (w.in_features % 8 && mask[pitch - 1] >> (w.in_features % 8))
    return {Fault::padding, row, 0, mask[pitch - 1]};
  const int64_t expected = row_start(&w, row + 1) - row_start(&w, row);
  const int64_t found = popcount_row(mask, pitch);
  if (found != expected) return {Fault::row_count, row, expected, found};
  return {Fault::none, 0, 0, 0};
}

struct ReadCall {
  const uint64_t* words;
  int64_t count;
  std::atomic<uint64_t> sum;
};

// Four streams, prefetched as the kernels do: one stream alone does not reach the memory's limit.
uint64_t sum_words(const uint64_t* words, int64_t count) {
  constexpr int kStreams = 4, kLine = 8;
  const int64_t stride = count / kStreams / kLine * kLine;
  uint64_t sums[kStreams][kLine] = {};
  for (int64_t i = 0; i < stride; i += kLine) {
    for (int stream = 0; stream < kStreams; ++stream) {
      const uint64_t* line = words + stream * stride + i;
      __builtin_prefetch(line + 1024 / sizeof(uint64_t), 0, 3);
      for (int lane = 0; lane < kLine; ++lane) sums[stream][lane] += line[lane];
    }
  }
  uint64_t sum = 0;
  for (const auto& stream : sums)
    for (uint64_t lane : stream) sum += lane;
  return sum;
}

// Fewest rows worth handing to a thread.
constexpr int64_t kChunkRows = 32;

struct LinearCall {
  const LinearArgs* args;
  void (*multiply)(const LinearArgs*);
  std::atomic<int> next;
  int chunks;
};

struct UnpackCall {
  const LinearKernel* kernel;
  const Weight* weight;
  char* out;
  int64_t begin, end, row_bytes;
};

}  // namespace

bool has_slow_pairs() {
#if defined(PRUNE_LLM_X86)
  return can_run_avx512bf16() && __builtin_cpu_is("intel");  // see isa_avx512vbmi2.cpp
#else
  return false;
#endif
}

int supported_isas(const Isa* found[kMaxIsas]) {
  int count = 0;
#if defined(PRUNE_LLM_X86)
  const auto add_pairs = [&] {
    if (!can_run_avx512bf16()) return;
    if (is_zen5()) found[count++] = isa_zen5();
    found[count++] = isa_avx512bf16();
    if (!is_zen5()) found[count++] = isa_zen5();
  };
  if (!has_slow_pairs()) add_pairs();
  if (can_run_avx512vbmi2()) found[count++] = isa_avx512vbmi2();
  if (has_slow_pairs()) add_pairs();
  if (can_run_avx512()) found[count++] = isa_avx512();
  if (can_run_avx2()) found[count++] = isa_avx2();
#elif defined(PRUNE_LLM_NEON)
  found[count++] = isa_neon();
#endif
  found[count++] = isa_portable();
  return count;
}

Check check_weight(const Weight& weight) {
  const Check offsets = check_offsets(weight);
  if (offsets.fault != Fault::none) return offsets;
  for (int64_t row = 0; row < weight.out_features; ++row) {
    const Check check = check_row(weight, row);
    if (check.fault != Fault::none) return check;
  }
  return {Fault::none, 0, 0, 0};
}

void run_linear(const Isa& isa, DType dtype, int threads, const Weight& weight, const void* x,
                int64_t batch, const void* bias, void* y) {
  const LinearKernel& kernel = isa.linear[dtype];
  const int64_t elem_bytes = dtype == kF32 ? 4 : 2;
  LinearArgs args{&weight, x, weight.in_features, batch, bias, y, nullptr, 0, 0};
  if (!kernel.x_in_place || weight.in_features % kPad) {
    args.x_pitch = (weight.in_features + kPad - 1) / kPad * kPad;
    const int64_t pitch_bytes = args.x_pitch * kernel.x_bytes;
    char* prepared = static_cast<char*>(scratch.get(static_cast<size_t>(batch * pitch_bytes)));
    for (int64_t m = 0; m < batch; ++m)
      kernel.prepare(static_cast<const char*>(x) + m * weight.in_features * elem_bytes,
                     weight.in_features, prepared + m * pitch_bytes);
    args.x = prepared;
  }
  // more chunks than threads: one that the system interrupts leaves its chunks to the others
  const int64_t most = std::max<int64_t>(weight.out_features / kChunkRows, 1);
  LinearCall call{&args, weight.bitmask ? kernel.sparse : kernel.dense, {},
                  threads <= 1 ? 1 : static_cast<int>(std::min<int64_t>(threads * 8, most))};
  const auto part = [](void* context, int, int) {
    LinearCall* call = static_cast<LinearCall*>(context);
    LinearArgs mine = *call->args;
    for (int chunk; (chunk = call->next++) < call->chunks;) {
      mine.begin = split_row(*mine.weight, chunk, call->chunks);
      mine.end = split_row(*mine.weight, chunk + 1, call->chunks);
      call->multiply(&mine);
    }
  };
  run_parallel(threads, part, &call);
}

void run_unpack(const Isa& isa, DType dtype, int threads, const Weight& weight, void* out,
                int64_t begin, int64_t end) {
  UnpackCall call{&isa.linear[dtype], &weight,
                  static_cast<char*>(out), begin,
                  end,                weight.in_features * (dtype == kF32 ? 4 : 2)};
  const auto part = [](void* context, int part, int parts) {
    const UnpackCall* call = static_cast<const UnpackCall*>(context);
    const int64_t rows = call->end - call->begin;
    const int64_t first = rows * part / parts, last = rows * (part + 1) / parts;
    call->kernel->unpack(call->weight, call->out + first * call->row_bytes, call->begin + first,
                         call->begin + last);
  };
  run_parallel(threads, part, &call);
}

uint64_t read_all(const void* data, int64_t bytes, int threads) {
  ReadCall call{static_cast<const uint64_t*>(data), bytes / 8, {}};
  const auto part = [](void* context, int part, int parts) {
    ReadCall* call = static_cast<ReadCall*>(context);
    const int64_t first = call->count * part / parts, last = call->count * (part + 1) / parts;
    call->sum += sum_words(call->words + first, last - first);
  };
  run_parallel(threads, part, &call);
  return call.sum;
}

void use_huge_pages(const void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, newer than many C libraries' headers
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kHugePage - 1);
  if (end <= begin) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
#else
  (void)data, (void)bytes;
#endif
}
