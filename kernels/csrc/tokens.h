// Products over many tokens in bfloat16, for calibration and prefill: the Gram matrix of a layer's
// inputs, its product with others, and causal attention. C interface, as kernels.h: nullptr where an instruction set has none.
//
// Shape letters: T = tokens, I = input features, D = size of an attention head, or columns of the
// left factor.
#pragma once

#include <stdint.h>

// C += A^T B for a [T, D], b [T, I], C float32 [D, I]. Columns go in panels of kGramPanel. For a Gram
// matrix a is b, and a panel of rows needs no panel of columns behind its own.
enum { kGramPanel = 48 };

struct GramKernel {
  // x [T, I] -> packed [panels, (T + 1) / 2, kGramPanel], each entry two tokens of one column
  void (*pack)(const uint16_t* x, int64_t tokens, int64_t width, int64_t panel, uint32_t* packed);
  // C's rows in `panel` of a, columns in the first `panels` of b
  void (*add)(const uint32_t* a, const uint32_t* b, int64_t tokens, int64_t height, int64_t width,
              int64_t panel, int64_t panels, float* sum);
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
const AttentionKernel* attention_avx512(void);
const AttentionKernel* attention_avx2(void);
#ifdef __cplusplus
}
#endif
