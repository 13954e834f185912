// A recorded sequence of operations over fixed buffers, replayed as often as wanted: one call and
// one set of threads for a whole decode step. What changes between replays lies in the buffers.
#pragma once

#include <stdint.h>

#include <memory>
#include <vector>

#include "decode.h"
#include "linear.h"

// One weight of a linear operation.
struct PlanWeight {
  Weight weight;
  const void* bias;  // nullptr: none
  void* y;           // [batch, O]
};

class Plan {
 public:
  Plan(const Isa& isa, DType dtype);
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // y = x W^T + bias for weights that share x [batch, I]; `accumulate` adds to y instead.
  void add_linears(const void* x, int64_t batch, int64_t in_features,
                   const std::vector<PlanWeight>& weights, bool accumulate);
  void add_rms_norm(const NormArgs& args);
  void add_silu_mul(const GateArgs& args);
  // Stores the new keys and values, then attends.
  void add_attention(const AttentionStep& args);

  // Runs every operation in order on `threads` threads; the results do not depend on how many.
  // Returns false, and runs nothing, if a position or slot is outside its cache.
  // One run at a time.
  bool run(int threads);

  struct Op;

 private:
  const Isa& isa_;
  const DType dtype_;
  std::vector<std::unique_ptr<Op>> ops_;
  std::vector<AttentionStep> attentions_;
};
