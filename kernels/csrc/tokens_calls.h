// The kernels of tokens.h over whole tensors, spread over threads; results do not depend on how many.
#pragma once

#include <stdint.h>

#include "decode.h"
#include "tokens.h"

struct Factor {
  const uint16_t* x;  // [T, width]
  int64_t width;
  uint32_t* packed;  // ceil(width / kGramPanel) * ceil(T / 2) * kGramPanel entries
};

struct GramCall {
  Factor a, b;
  int64_t tokens;
  float* sum;  // [a.width, b.width]
  bool lower;  // b is a: on and below the diagonal only
};

// q, out [B, H, T, D], k, v [B, KV, T, D]; any strides but D's, which is 1. H is a multiple of KV.
struct AttentionCall {
  AttentionArgs head;  // the first head of the first sample
  int64_t batch, heads, kv_heads;
  int64_t q_batch, q_head, k_batch, k_head, v_batch, v_head, out_batch, out_head;
  void* scratch;  // threads * scratch_bytes
};

// The row operations of decode.h over many rows at once.
void run_rms_norm(const DecodeKernel& kernel, int threads, const NormArgs& args);
void run_silu_mul(const DecodeKernel& kernel, int threads, const GateArgs& args);
void run_rotate(const DecodeKernel& kernel, int threads, const RotateArgs& args);
void run_add_squares(const DecodeKernel& kernel, int threads, const SquareArgs& args);

void run_gram(const GramKernel& kernel, int threads, const GramCall& call);
void run_attention(const AttentionKernel& kernel, int threads, const AttentionCall& call);
