#include <atomic>

#include "threads.h"
#include "tokens_calls.h"

namespace {

struct GramRun {
  const GramKernel* kernel;
  const GramCall* call;
  int64_t panels;
  std::atomic<int64_t> next;
};

// The longest rows first, so that no thread ends with one.
void gram_part(void* context, int, int) {
  GramRun& run = *static_cast<GramRun*>(context);
  const GramCall& c = *run.call;
  for (int64_t i = run.next++; i < run.panels; i = run.next++)
    run.kernel->add(c.packed, c.tokens, c.width, run.panels - 1 - i, c.sum);
}

void pack_part(void* context, int, int) {
  GramRun& run = *static_cast<GramRun*>(context);
  const GramCall& c = *run.call;
  for (int64_t i = run.next++; i < run.panels; i = run.next++)
    run.kernel->pack(c.x, c.tokens, c.width, i, c.packed);
}

struct AttentionRun {
  const AttentionKernel* kernel;
  const AttentionCall* call;
  int64_t scratch_bytes;
  std::atomic<int64_t> next;
};

void attention_part(void* context, int part, int) {
  AttentionRun& run = *static_cast<AttentionRun*>(context);
  const AttentionCall& c = *run.call;
  char* scratch = static_cast<char*>(c.scratch) + part * run.scratch_bytes;
  const int64_t group = c.heads / c.kv_heads;
  for (int64_t i = run.next++; i < c.batch * c.heads; i = run.next++) {
    const int64_t b = i / c.heads, h = i % c.heads;
    AttentionArgs args = c.head;
    args.q += b * c.q_batch + h * c.q_head;
    args.k += b * c.k_batch + h / group * c.k_head;
    args.v += b * c.v_batch + h / group * c.v_head;
    args.out += b * c.out_batch + h * c.out_head;
    run.kernel->causal(&args, scratch);
  }
}

}  // namespace

void run_gram(const GramKernel& kernel, int threads, const GramCall& call) {
  GramRun run{&kernel, &call, (call.width + kGramPanel - 1) / kGramPanel, {0}};
  run_parallel(threads, &pack_part, &run);
  run.next = 0;
  run_parallel(threads, &gram_part, &run);
}

void run_attention(const AttentionKernel& kernel, int threads, const AttentionCall& call) {
  AttentionRun run{&kernel, &call,
                   kernel.scratch_bytes(call.head.tokens, call.head.head_size), {0}};
  run_parallel(threads, &attention_part, &run);
}
