// The C interface between the extension and its instruction sets: plain structs, no C++ library.
//
// Shape letters: O = output features, I = input features, M = rows of x.
#pragma once

#include <stdint.h>

#include "channels.h"
#include "decode.h"

enum DType { kBF16 = 0, kF16 = 1, kF32 = 2, kDTypes = 3 };

// A weight [O, I] in the stored form (bitmask != nullptr) or dense (bitmask == nullptr).
//
// bitmask  [O, ceil(I/8)] bytes, bit j (least significant first) of byte b keeps column 8b + j
// values   [nnz] kept values in row-major order; for a dense weight [O, I]
// offsets  [O + 1] start of each row in values, as int32 or int64; nullptr: every row has row_nnz
struct Weight {
  const uint8_t* bitmask;
  const void* values;
  const void* offsets;
  int64_t offset_bytes;  // 0, 4 or 8
  int64_t out_features;
  int64_t in_features;
  int64_t nnz;
  int64_t row_nnz;
};

static inline int64_t row_start(const Weight* w, int64_t row) {
  if (w->offset_bytes == 4) return ((const int32_t*)w->offsets)[row];
  if (w->offset_bytes == 8) return ((const int64_t*)w->offsets)[row];
  return row * w->row_nnz;
}

static inline int64_t mask_pitch(const Weight* w) { return (w->in_features + 7) / 8; }

// Prepared inputs are padded with zeros to a multiple of this many columns.
enum { kPad = 64 };

// One call multiplies rows [begin, end) of the weight with `batch` prepared inputs:
// y[m, o] = sum_i w[o, i] * x[m, i] + bias[o] + addend[m, o]; y and addend are [batch, O]; bias and
// addend may be nullptr, addend may be y.
struct LinearArgs {
  const Weight* weight;
  const void* x;
  int64_t x_pitch;  // elements between two prepared inputs
  int64_t batch;
  const void* bias;
  void* y;
  const void* addend;
  int64_t begin;
  int64_t end;
};

struct LinearKernel {
  int64_t x_bytes;  // size of one element of a prepared input
  int x_in_place;   // x needs no preparation where I is a multiple of kPad
  // one row of x [I] -> one prepared row, padded to kPad columns; the order of columns inside a
  // group of kPad is the kernel's own
  void (*prepare)(const void* x, int64_t columns, void* prepared);
  void (*sparse)(const LinearArgs* args);
  void (*dense)(const LinearArgs* args);
  // rows [begin, end) of the weight, dense, to out [end - begin, I]
  void (*unpack)(const Weight* weight, void* out, int64_t begin, int64_t end);
};

struct GramKernel;
struct AttentionKernel;

struct Isa {
  const char* name;
  LinearKernel linear[kDTypes];
  DecodeKernel decode[kDTypes];
  ChannelKernel channels[kDTypes];
  // products over many tokens in bfloat16 (tokens.h); nullptr: left to torch
  const GramKernel* (*gram)(void) = nullptr;
  const AttentionKernel* (*attention)(void) = nullptr;
};

#ifdef __cplusplus
extern "C" {
#endif
// One table per instruction set that the build contains.
const Isa* isa_avx512bf16(void);
const ChannelKernel* channels_zen5(void);  // of bf16
const Isa* isa_avx512vbmi2(void);
const Isa* isa_avx512(void);
const Isa* isa_avx2(void);
const Isa* isa_neon(void);
const Isa* isa_portable(void);
#ifdef __cplusplus
}
#endif
