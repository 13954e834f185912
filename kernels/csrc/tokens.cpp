#include <algorithm>
#include <atomic>

#include "threads.h"
#include "tokens_calls.h"

namespace {

struct GramRun {
  const GramKernel* kernel;
  const GramCall* call;
  int64_t a_panels, b_panels;
  std::atomic<int64_t> next;
};

// The longest rows first, so that no thread ends with one.
void gram_part(void* context, int, int) {
  GramRun& run = *static_cast<GramRun*>(context);
  const GramCall& c = *run.call;
  for (int64_t i = run.next++; i < run.a_panels; i = run.next++) {
    const int64_t panel = run.a_panels - 1 - i;
    run.kernel->add(c.a.packed, c.b.packed, c.tokens, c.a.width, c.b.width, panel,
                    c.lower ? panel + 1 : run.b_panels, c.sum);
  }
}

void pack_part(void* context, int, int) {
  GramRun& run = *static_cast<GramRun*>(context);
  const GramCall& c = *run.call;
  const int64_t panels = run.a_panels + (c.lower ? 0 : run.b_panels);
  for (int64_t i = run.next++; i < panels; i = run.next++) {
    const Factor& f = i < run.a_panels ? c.a : c.b;
    run.kernel->pack(f.x, c.tokens, f.width, i < run.a_panels ? i : i - run.a_panels, f.packed);
  }
}

struct AttentionRun {
  const AttentionKernel* kernel;
  const AttentionCall* call;
  int64_t scratch_bytes;
  int64_t pieces;  // of a group of query heads, where groups are too few for the threads
  std::atomic<int64_t> next;
};

void attention_part(void* context, int part, int) {
  AttentionRun& run = *static_cast<AttentionRun*>(context);
  const AttentionCall& c = *run.call;
  char* scratch = static_cast<char*>(c.scratch) + part * run.scratch_bytes;
  const int64_t group = c.heads / c.kv_heads, units = c.batch * c.kv_heads * run.pieces;
  for (int64_t i = run.next++; i < units; i = run.next++) {
    const int64_t piece = i % run.pieces, kv = i / run.pieces % c.kv_heads;
    const int64_t b = i / run.pieces / c.kv_heads;
    AttentionArgs args = c.head;
    args.k += b * c.k_batch + kv * c.k_head;
    args.v += b * c.v_batch + kv * c.v_head;
    run.kernel->pack(&args, scratch);
    const int64_t last = kv * group + group * (piece + 1) / run.pieces;
    for (int64_t h = kv * group + group * piece / run.pieces; h < last; ++h) {
      args.q = c.head.q + b * c.q_batch + h * c.q_head;
      args.out = c.head.out + b * c.out_batch + h * c.out_head;
      run.kernel->causal(&args, scratch);
    }
  }
}

// An operation over items [0, count), dealt out in pieces of `step`.
template <class Args> struct RowsRun {
  void (*run)(const Args*, int64_t, int64_t);
  const Args* args;
  int64_t count, step;
  std::atomic<int64_t> next;
};

template <class Args> void rows_part(void* context, int, int) {
  RowsRun<Args>& run = *static_cast<RowsRun<Args>*>(context);
  for (int64_t i = run.next++; i * run.step < run.count; i = run.next++)
    run.run(run.args, i * run.step, std::min(run.count, (i + 1) * run.step));
}

template <class Args>
void run_rows(int threads, void (*function)(const Args*, int64_t, int64_t), const Args& args,
              int64_t count, int64_t step) {
  RowsRun<Args> run{function, &args, count, step, {0}};
  run_parallel(count > step ? threads : 1, &rows_part<Args>, &run);
}

}  // namespace

void run_rms_norm(const DecodeKernel& kernel, int threads, const NormArgs& args) {
  run_rows(threads, kernel.rms_norm, args, args.rows, 16);
}

void run_silu_mul(const DecodeKernel& kernel, int threads, const GateArgs& args) {
  run_rows(threads, kernel.silu_mul, args, args.count, 16384);
}

void run_rotate(const DecodeKernel& kernel, int threads, const RotateArgs& args) {
  run_rows(threads, kernel.rotate, args, args.batch * args.tokens, 16);
}

void run_add_squares(const DecodeKernel& kernel, int threads, const SquareArgs& args) {
  run_rows(threads, kernel.add_squares, args, args.width, 256);
}

void run_gram(const GramKernel& kernel, int threads, const GramCall& call) {
  const auto panels = [](int64_t width) { return (width + kGramPanel - 1) / kGramPanel; };
  GramRun run{&kernel, &call, panels(call.a.width), panels(call.b.width), {0}};
  run_parallel(threads, &pack_part, &run);
  run.next = 0;
  run_parallel(threads, &gram_part, &run);
}

void run_attention(const AttentionKernel& kernel, int threads, const AttentionCall& call) {
  const int64_t groups = call.batch * call.kv_heads, group = call.heads / call.kv_heads;
  const int64_t pieces = std::min<int64_t>(group, (threads + groups - 1) / groups);
  AttentionRun run{&kernel, &call, kernel.scratch_bytes(call.head.tokens, call.head.head_size),
                   pieces, {0}};
  run_parallel(threads, &attention_part, &run);
}
