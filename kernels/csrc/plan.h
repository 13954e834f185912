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

// One weight of a linear operation over channels.
struct PlanChannels {
  ChannelWeight weight;
  const void* bias;  // nullptr: none
  void* y;           // [batch, O]
};

// An input x [batch, I] that linears share, and which of it counts: see SelectArgs.
struct ChannelSite {
  const void* x;
  const float* scales;
  const float* thresholds;  // [batch], read at every run
  int64_t in_features, batch;
  int64_t* counts;  // [3] grows by channels listed, inputs that count, rows; nullptr: not wanted
};

struct ChannelMemory;

class Plan {
 public:
  Plan(const Isa& isa, DType dtype);
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // y = x W^T + bias for weights that share x [batch, I]; `accumulate` adds to y instead.
  void add_linears(const void* x, int64_t batch, int64_t in_features,
                   const std::vector<PlanWeight>& weights, bool accumulate);
  // The same over channels that count. `gated`: two weights of one shape, and the first's y
  // = silu(x W1^T + bias1) * (x W2^T + bias2).
  void add_channels(const ChannelSite& site, const std::vector<PlanChannels>& weights,
                    bool accumulate, bool gated);
  // args over all the `batch` rows of the plan
  void add_rms_norm(const NormArgs& args, int64_t batch);
  void add_silu_mul(const GateArgs& args, int64_t batch);
  // Stores the new keys and values, then attends.
  void add_attention(const AttentionStep& args);

  // Runs every operation in order, on the first `rows` of its buffers (below 0: on all) and on
  // `threads` threads; a row's results do not depend on either. Returns false, and runs nothing, if
  // a position or page is outside its cache. One run at a time.
  bool run(int threads, int64_t rows);

  struct Op;

 private:
  const Isa& isa_;
  const DType dtype_;
  std::shared_ptr<ChannelMemory> channel_memory_;  // nullptr: no linear over channels yet
  std::vector<std::unique_ptr<Op>> ops_;
  std::vector<Op*> busy_;  // those of ops_ that have work for rows_
  int64_t rows_ = 0;
  std::vector<AttentionStep> places_;  // attentions that differ in where their rows lie
};
