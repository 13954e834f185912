#include "plan_op.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <sched.h>

#include <algorithm>
#include <atomic>

#include "threads.h"

namespace {

// Threads meet between two operations. They spin, because an operation lasts microseconds, and
// give way when somebody else needs the core.
class Barrier {
 public:
  // The last thread to arrive calls `reset` before any goes on.
  template <class Reset> void wait(int parts, Reset reset) {
    const unsigned turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == parts - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      reset();
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
#if defined(__x86_64__)
      _mm_pause();
#endif
      if (spins >= kSpins) sched_yield();
    }
  }

 private:
  static constexpr int kSpins = 4000;
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> turn_{0};
};

constexpr int64_t kNormRows = 1, kGateValues = 1024, kHeadsPerItem = 4;

}  // namespace

namespace {

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

struct PrepareOp : Plan::Op {
  const LinearKernel& kernel;
  const char* x;
  const int64_t most;
  int64_t batch, in_features, row_bytes, pitch_bytes;
  AlignedMemory prepared;

  PrepareOp(const LinearKernel& kernel, const void* x, int64_t batch, int64_t in_features,
            int64_t elem_bytes)
      : kernel(kernel), x(static_cast<const char*>(x)), most(batch), batch(batch),
        in_features(in_features), row_bytes(in_features * elem_bytes),
        pitch_bytes(ceil_div(in_features, kPad) * kPad * kernel.x_bytes),
        prepared(allocate_aligned(std::max<int64_t>(1, batch * pitch_bytes))) {}
  bool resize(int64_t rows) override { return (batch = rows_of_run(rows, most)) > 0; }
  int64_t chunks(int) const override { return batch; }
  void run(int64_t m, int64_t) override {
    kernel.prepare(x + m * row_bytes, in_features,
                   static_cast<char*>(prepared.get()) + m * pitch_bytes);
  }
};

struct LinearsOp : Plan::Op {
  const LinearKernel& kernel;
  const void* x;
  const int64_t x_pitch, most;
  int64_t batch, rows = 0;
  std::vector<PlanWeight> weights;
  bool accumulate;

  LinearsOp(const LinearKernel& kernel, const void* x, int64_t x_pitch, int64_t batch,
            const std::vector<PlanWeight>& weights, bool accumulate)
      : kernel(kernel), x(x), x_pitch(x_pitch), most(batch), batch(batch), weights(weights),
        accumulate(accumulate) {
    for (const PlanWeight& w : weights) rows += w.weight.out_features;
  }
  bool resize(int64_t run_rows) override { return (batch = rows_of_run(run_rows, most)) > 0; }
  int64_t chunks(int parts) const override {
    return parts == 1 ? 1 : std::min<int64_t>(parts * 8, std::max<int64_t>(rows / 32, 1));
  }
  // Chunks are runs of the rows of all weights behind each other.
  void run(int64_t chunk, int64_t chunks) override {
    int64_t begin = rows * chunk / chunks, end = rows * (chunk + 1) / chunks;
    for (const PlanWeight& w : weights) {
      const int64_t count = w.weight.out_features;
      if (begin < count && end > 0) {
        const LinearArgs args{&w.weight, x, x_pitch, batch, w.bias, w.y,
                              accumulate ? w.y : nullptr, std::max<int64_t>(begin, 0),
                              std::min(end, count)};
        (w.weight.bitmask ? kernel.sparse : kernel.dense)(&args);
      }
      begin -= count, end -= count;
    }
  }
};

// A function over the items of every row, `step` of them a piece.
template <class Args> struct RowsOp : Plan::Op {
  void (*const function)(const Args*, int64_t, int64_t);
  const Args args;
  const int64_t batch, per_row, step;
  int64_t count;

  RowsOp(void (*function)(const Args*, int64_t, int64_t), const Args& args, int64_t batch,
         int64_t per_row, int64_t step)
      : function(function), args(args), batch(batch), per_row(per_row), step(step),
        count(batch * per_row) {}
  bool resize(int64_t rows) override { return (count = rows_of_run(rows, batch) * per_row) > 0; }
  int64_t chunks(int) const override { return ceil_div(count, step); }
  void run(int64_t chunk, int64_t) override {
    function(&args, chunk * step, std::min(count, (chunk + 1) * step));
  }
};

struct AttendOp : Plan::Op {
  const DecodeKernel& kernel;
  AttentionStep args;
  const int64_t most;

  AttendOp(const DecodeKernel& kernel, const AttentionStep& args)
      : kernel(kernel), args(args), most(args.batch) {}
  bool resize(int64_t rows) override { return (args.batch = rows_of_run(rows, most)) > 0; }
  // Whole groups, which read the cache once; parts of them where there are fewer than threads.
  int64_t step(int parts) const {
    const int64_t group = args.heads / args.kv_heads, groups = args.batch * args.kv_heads;
    const int64_t pieces = std::min<int64_t>(group, std::max<int64_t>(1, parts / groups));
    return ceil_div(group, pieces);
  }
  int64_t chunks(int parts) const override {
    const int64_t group = args.heads / args.kv_heads;
    return args.batch * args.kv_heads * ceil_div(group, step(parts));
  }
  void run(int64_t chunk, int64_t chunks) override {
    const int64_t group = args.heads / args.kv_heads, groups = args.batch * args.kv_heads;
    const int64_t pieces = chunks / groups, size = ceil_div(group, pieces);
    const int64_t begin = chunk / pieces * group + chunk % pieces * size;
    kernel.attend(&args, begin, std::min(begin + size, (chunk / pieces + 1) * group));
  }
};

struct PlanCall {
  const std::vector<Plan::Op*>* ops;
  Barrier barrier;
};

void run_part(void* context, int, int parts) {
  PlanCall& call = *static_cast<PlanCall*>(context);
  const auto& ops = *call.ops;
  for (size_t i = 0; i < ops.size(); ++i) {
    Plan::Op& op = *ops[i];
    const int64_t chunks = op.chunks(parts);
    for (int64_t chunk; (chunk = op.next.fetch_add(1, std::memory_order_relaxed)) < chunks;)
      op.run(chunk, chunks);
    call.barrier.wait(parts, [&] {
      op.next.store(0, std::memory_order_relaxed);
      if (i + 1 < ops.size()) ops[i + 1]->before();
    });
  }
}

}  // namespace

namespace {

bool has_place(const AttentionStep& step, int64_t b) {
  const int64_t position = step.positions[b];
  if (position < 0) return true;
  if (position >= step.page_count * step.page_size) return false;
  const int64_t* pages = step.pages + b * step.page_count;
  return std::all_of(pages, pages + position / step.page_size + 1,
                     [&](int64_t page) { return page >= 0 && page < step.cache_pages; });
}

bool same_places(const AttentionStep& a, const AttentionStep& b) {
  return a.pages == b.pages && a.positions == b.positions && a.batch == b.batch &&
         a.page_size == b.page_size && a.cache_pages == b.cache_pages &&
         a.page_count == b.page_count;
}

}  // namespace

Plan::Plan(const Isa& isa, DType dtype) : isa_(isa), dtype_(dtype) {}
Plan::~Plan() = default;

void Plan::add_linears(const void* x, int64_t batch, int64_t in_features,
                       const std::vector<PlanWeight>& weights, bool accumulate) {
  const LinearKernel& kernel = isa_.linear[dtype_];
  int64_t pitch = in_features;
  if (!kernel.x_in_place || in_features % kPad) {
    auto prepare = std::make_unique<PrepareOp>(kernel, x, batch, in_features,
                                               dtype_ == kF32 ? 4 : 2);
    x = prepare->prepared.get();
    pitch = ceil_div(in_features, kPad) * kPad;
    ops_.push_back(std::move(prepare));
  }
  ops_.push_back(std::make_unique<LinearsOp>(kernel, x, pitch, batch, weights, accumulate));
}

void Plan::add_rms_norm(const NormArgs& args, int64_t batch) {
  ops_.push_back(std::make_unique<RowsOp<NormArgs>>(isa_.decode[dtype_].rms_norm, args, batch,
                                                    args.rows / batch, kNormRows));
}

void Plan::add_silu_mul(const GateArgs& args, int64_t batch) {
  ops_.push_back(std::make_unique<RowsOp<GateArgs>>(isa_.decode[dtype_].silu_mul, args, batch,
                                                    args.count / batch, kGateValues));
}

void Plan::add_attention(const AttentionStep& args) {
  if (places_.empty() || !same_places(places_.back(), args)) places_.push_back(args);
  ops_.push_back(std::make_unique<RowsOp<AttentionStep>>(isa_.decode[dtype_].store_heads, args,
                                                         args.batch,
                                                         args.heads + 2 * args.kv_heads,
                                                         kHeadsPerItem));
  ops_.push_back(std::make_unique<AttendOp>(isa_.decode[dtype_], args));
}

bool Plan::run(int threads, int64_t rows) {
  for (const AttentionStep& step : places_)
    for (int64_t b = 0; b < rows_of_run(rows, step.batch); ++b)
      if (!has_place(step, b)) return false;
  if (rows != rows_ || busy_.empty()) {
    busy_.clear();
    for (const auto& op : ops_)
      if (op->resize(rows)) busy_.push_back(op.get());
    rows_ = rows;
  }
  if (busy_.empty()) return true;
  PlanCall call{&busy_, {}};
  busy_.front()->before();
  run_parallel(threads, run_part, &call);
  return true;
}
