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
  int64_t batch, in_features, row_bytes, pitch_bytes;
  AlignedMemory prepared;

  PrepareOp(const LinearKernel& kernel, const void* x, int64_t batch, int64_t in_features,
            int64_t elem_bytes)
      : kernel(kernel), x(static_cast<const char*>(x)), batch(batch), in_features(in_features),
        row_bytes(in_features * elem_bytes),
        pitch_bytes(ceil_div(in_features, kPad) * kPad * kernel.x_bytes),
        prepared(allocate_aligned(std::max<int64_t>(1, batch * pitch_bytes))) {}
  int64_t chunks(int) const override { return batch; }
  void run(int64_t m, int64_t) override {
    kernel.prepare(x + m * row_bytes, in_features,
                   static_cast<char*>(prepared.get()) + m * pitch_bytes);
  }
};

struct LinearsOp : Plan::Op {
  const LinearKernel& kernel;
  const void* x;
  int64_t x_pitch, batch, rows = 0;
  std::vector<PlanWeight> weights;
  bool accumulate;

  LinearsOp(const LinearKernel& kernel, const void* x, int64_t x_pitch, int64_t batch,
            const std::vector<PlanWeight>& weights, bool accumulate)
      : kernel(kernel), x(x), x_pitch(x_pitch), batch(batch), weights(weights),
        accumulate(accumulate) {
    for (const PlanWeight& w : weights) rows += w.weight.out_features;
  }
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

// A function over items [0, count), `step` of them a piece.
template <class Args> struct RowsOp : Plan::Op {
  void (*const function)(const Args*, int64_t, int64_t);
  const Args args;
  const int64_t count, step;

  RowsOp(void (*function)(const Args*, int64_t, int64_t), const Args& args, int64_t count,
         int64_t step)
      : function(function), args(args), count(count), step(step) {}
  int64_t chunks(int) const override { return ceil_div(count, step); }
  void run(int64_t chunk, int64_t) override {
    function(&args, chunk * step, std::min(count, (chunk + 1) * step));
  }
};

struct AttendOp : Plan::Op {
  const DecodeKernel& kernel;
  AttentionStep args;

  AttendOp(const DecodeKernel& kernel, const AttentionStep& args) : kernel(kernel), args(args) {}
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
  std::vector<std::unique_ptr<Plan::Op>>* ops;
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
  const int64_t position = step.positions[b], slot = step.slots[b];
  return position < 0 || (position < step.capacity && slot >= 0 && slot < step.slot_count);
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

void Plan::add_rms_norm(const NormArgs& args) {
  ops_.push_back(std::make_unique<RowsOp<NormArgs>>(isa_.decode[dtype_].rms_norm, args, args.rows,
                                                    kNormRows));
}

void Plan::add_silu_mul(const GateArgs& args) {
  ops_.push_back(std::make_unique<RowsOp<GateArgs>>(isa_.decode[dtype_].silu_mul, args, args.count,
                                                    kGateValues));
}

void Plan::add_attention(const AttentionStep& args) {
  attentions_.push_back(args);
  const int64_t heads = args.batch * (args.heads + 2 * args.kv_heads);
  ops_.push_back(std::make_unique<RowsOp<AttentionStep>>(isa_.decode[dtype_].store_heads, args,
                                                         heads, kHeadsPerItem));
  ops_.push_back(std::make_unique<AttendOp>(isa_.decode[dtype_], args));
}

bool Plan::run(int threads) {
  for (const AttentionStep& step : attentions_)
    for (int64_t b = 0; b < step.batch; ++b)
      if (!has_place(step, b)) return false;
  if (ops_.empty()) return true;
  PlanCall call{&ops_, {}};
  ops_.front()->before();
  run_parallel(threads, run_part, &call);
  return true;
}
