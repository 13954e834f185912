// Products over many tokens in bfloat16, for calibration and prefill: the Gram matrix of a layer's
// inputs and causal attention. C interface, as kernels.h: nullptr where an instruction set has none.
//
// Shape letters: T = tokens, I = input features, D = size of an attention head.
#pragma once

#include <stdint.h>

// G += X^T X for x [T, I], G float32 [I, I], on and below the diagonal. Columns go in panels of
// kGramPanel; what is written lies in panels on or left of the diagonal one.
enum { kGramPanel = 48 };

struct GramKernel {
  // x [T, I] -> packed [panels, (T + 1) / 2, kGramPanel], each entry two tokens of one column
  void (*pack)(const uint16_t* x, int64_t tokens, int64_t width, int64_t panel, uint32_t* packed);
  // all of G's rows in `panel`, from everything packed
  void (*add)(const uint32_t* packed, int64_t tokens, int64_t width, int64_t panel, float* sum);
};

// One head: rows of q, k, v and out are `*_pitch` elements apart, D values each, D even.
struct AttentionArgs {
  const uint16_t* q;
  const uint16_t* k;
  const uint16_t* v;
  uint16_t* out;
  int64_t q_pitch, k_pitch, v_pitch, out_pitch;
  int64_t tokens, head_size;
  float scale;
};

struct AttentionKernel {
  int64_t (*scratch_bytes)(int64_t tokens, int64_t head_size);
  // Packs k and v into scratch, aligned to 64 bytes; serves every query head that shares them.
  void (*pack)(const AttentionArgs* args, void* scratch);
  // out[t] = softmax(scale * q[t] . k[0..t]) v[0..t], with what was packed
  void (*causal)(const AttentionArgs* args, void* scratch);
};

#ifdef __cplusplus
extern "C" {
#endif
const GramKernel* gram_avx512bf16(void);
const AttentionKernel* attention_avx512bf16(void);
#ifdef __cplusplus
}
#endif
