// The small operations of a block around its linears: normalisation, rotary embedding and the KV
// cache, attention of one new token per sequence, SwiGLU; and what calibration sums. C interface, as
// kernels.h.
//
// Shape letters: B = rows, H = query heads, K = key-value heads, D = size of a head, R = its rotated
// part, T = tokens of a page of the cache, a multiple of kKeyLanes, N = pages of a sequence.
#pragma once

#include <stdint.h>

// Keys are stored in groups of this many tokens, the tokens of a group innermost: scores then need
// no sum across lanes. Values are stored by token, D rounded up to this many.
enum { kKeyLanes = 16 };

static inline int64_t round_to_lanes(int64_t n) {
  return (n + kKeyLanes - 1) / kKeyLanes * kKeyLanes;
}

// y[row] = x[row] / sqrt(mean(x[row]^2) + eps) * weight; y may be x
struct NormArgs {
  const void* x;
  const void* weight;  // [width]
  void* y;
  int64_t rows, width;
  float eps;
};

// y = gate / (1 + e^-gate) * up; y may be gate or up
struct GateArgs {
  const void* gate;
  const void* up;
  void* y;
  int64_t count;
};

// Heads of whole sequences, rotated and moved together: x [B, N, H, D] -> y [B, H, N, D], for N
// tokens; rows of x are `pitch` elements apart. cosine and sine are [N, R]; R = 0 only moves.
struct RotateArgs {
  const void* x;
  void* y;
  const float* cosine;
  const float* sine;
  int64_t batch, tokens, heads, head_size, rotary, pitch;
};

// sum[i] += x[t][i]^2 for x [tokens, width]
struct SquareArgs {
  const void* x;
  double* sum;
  int64_t tokens, width;
};

// One token of each row; several rows may be successive tokens of one sequence. A row with a
// negative position is left out and its `out` zeroed.
struct AttentionStep {
  void* q;        // [B, H, D]; rotated in place
  const void* k;  // [B, K, D]
  const void* v;  // [B, K, D]
  const float* cosine;
  const float* sine;  // [N T, R]
  void* keys;         // [cache_pages, K, T / kKeyLanes, D, kKeyLanes]
  void* values;       // [cache_pages, K, T, D rounded up]
  const int64_t* pages;      // [B, N] where token t of a sequence lies: on pages[t / T], at t % T
  const int64_t* positions;  // [B] of the token, below N T
  void* out;                 // [B, H, D]
  int64_t batch, heads, kv_heads, head_size, rotary, page_size, cache_pages, page_count;
  int64_t window;  // tokens a query sees, itself included; 0: all
  float scale;
};

// The row of the cache, in tokens, where a key-value head keeps token t of row b's sequence.
static inline int64_t cache_row(const struct AttentionStep* a, int64_t b, int64_t kv, int64_t t) {
  const int64_t page = a->pages[b * a->page_count + t / a->page_size];
  return (page * a->kv_heads + kv) * a->page_size + t % a->page_size;
}

struct DecodeKernel {
  void (*rms_norm)(const NormArgs* args, int64_t begin_row, int64_t end_row);
  void (*silu_mul)(const GateArgs* args, int64_t begin, int64_t end);
  // Items are the B * N tokens.
  void (*rotate)(const RotateArgs* args, int64_t begin, int64_t end);
  // Columns [begin, end).
  void (*add_squares)(const SquareArgs* args, int64_t begin, int64_t end);
  // Rotates q and puts k and v into the cache; items are [B, H + 2 K] heads.
  void (*store_heads)(const AttentionStep* args, int64_t begin, int64_t end);
  // Query heads [begin, end) of all B * H; a run of heads of one group shares its reads.
  void (*attend)(const AttentionStep* args, int64_t begin, int64_t end);
};
