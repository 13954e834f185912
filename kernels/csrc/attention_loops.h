// Causal attention of one head without 16-bit products: everything is float32 between reading
// bfloat16 and rounding the result, the weights of the second product too. Written once and compiled
// for every instruction set: internal linkage, nothing from the C++ library, see rows.h.
//
// A translation unit defines V, vectors of kLanes floats:
//   Floats, kLanes, kVectors  the type; kVectors of them beside each other are columns of a tile
//   zero() all(f) load(p) store(p, v) fma(a, b, c) fnma(a, b, c) sub add mul div
//   max(a, b)         b where either is NaN
//   nearest(v)        to whole numbers;  times_power(v, n)  v 2^n for such an n
//   first(v, n, other)  the first n lanes of v, then those of other
//   round_to(p, v, n)   the first n lanes as bfloat16, to the nearest even; a NaN stays one
#pragma once

#include <stdint.h>

#include "tokens.h"

namespace {

// 6 queries x kVectors registers of columns: 12 or 24 sums in registers
constexpr int kRows = 6, kVectors = V::kVectors, kLanes = V::kLanes, kColumns = kVectors * kLanes;

typedef V::Floats Floats;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t round_up(int64_t n) { return (n + kColumns - 1) / kColumns * kColumns; }

float widen(uint16_t value) {
  const uint32_t bits = (uint32_t)value << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, 4);
  return wide;
}

// e^x for x <= 0: Cephes' polynomial on [-ln 2 / 2, ln 2 / 2], below 2 units in the last place;
// below -87 it is about 1e-38
Floats exp_of(Floats x) {
  x = V::max(V::all(-87.0f), x);  // this order keeps NaN
  const Floats n = V::nearest(V::mul(x, V::all(1.44269504f)));
  Floats r = V::fnma(n, V::all(0.693359375f), x);
  r = V::fnma(n, V::all(-2.12194440e-4f), r);
  const float coefficients[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                                1.6666665459e-1f, 5.0000001201e-1f};
  Floats p = V::all(1.9875691500e-4f);
  for (const float c : coefficients) p = V::fma(p, r, V::all(c));
  p = V::fma(V::mul(p, r), r, V::add(r, V::all(1.0f)));
  return V::times_power(p, n);
}

// Where one head's working copies lie.
struct Scratch {
  int64_t keys, columns;  // T and D rounded up
  float *keys_by_lane, *values_by_column, *scores, *queries;
};

int64_t floats(int64_t tokens, int64_t head_size) {
  const int64_t keys = round_up(tokens);
  return keys * head_size + keys * round_up(head_size) + kRows * (keys + head_size);
}

Scratch lay_out(void* memory, int64_t tokens, int64_t head_size) {
  Scratch s{};
  s.keys = round_up(tokens), s.columns = round_up(head_size);
  s.keys_by_lane = (float*)memory;
  s.values_by_column = s.keys_by_lane + s.keys * head_size;
  s.scores = s.values_by_column + s.keys * s.columns;
  s.queries = s.scores + kRows * s.keys;
  return s;
}

// k [T, D] -> [blocks of kColumns keys, D, kColumns keys]
void pack_keys(const AttentionArgs& a, const Scratch& s) {
  for (int64_t key = 0; key < s.keys; ++key) {
    float* out = s.keys_by_lane + key / kColumns * kColumns * a.head_size + key % kColumns;
    const uint16_t* row = a.k + key * a.k_pitch;
    for (int64_t d = 0; d < a.head_size; ++d)
      out[d * kColumns] = key < a.tokens ? widen(row[d]) : 0.0f;
  }
}

// v [T, D] -> [blocks of kColumns columns, T, kColumns columns]
void pack_values(const AttentionArgs& a, const Scratch& s) {
  for (int64_t block = 0; block < s.columns; block += kColumns)
    for (int64_t t = 0; t < s.keys; ++t) {
      float* out = s.values_by_column + block * s.keys + t * kColumns;
      const uint16_t* row = a.v + t * a.v_pitch + block;
      for (int64_t c = 0; c < kColumns; ++c)
        out[c] = t < a.tokens && block + c < a.head_size ? widen(row[c]) : 0.0f;
    }
}

typedef Floats Tile[kRows][kVectors];

// out[r][c] = sum over i of a[r][i] * b[i][c]
void multiply(const float* a, int64_t pitch, const float* b, int64_t count, Tile& out) {
  // a local array: the compiler must assume that `out` overlaps a or b
  Tile sum;
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = V::zero();
  for (int64_t i = 0; i < count; ++i, b += kColumns) {
    Floats right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = V::load(b + kLanes * v);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const Floats factor = V::all(a[r * pitch + i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = V::fma(factor, right[v], sum[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) out[r][v] = sum[r][v];
}

// One row of scores -> weights in their place, zero from `seen` on; returns their sum.
float soften(float* scores, int64_t seen, int64_t end) {
  const Floats least_value = V::all(-3.4e38f);
  Floats most = least_value;
  for (int64_t j = 0; j < seen; j += kLanes)
    most = V::max(most, V::first(V::load(scores + j), seen - j, least_value));
  float values[kLanes], top = -3.4e38f, sum = 0;
  V::store(values, most);
  for (const float value : values) top = value > top ? value : top;
  Floats total = V::zero();
  for (int64_t j = 0; j < end; j += kLanes) {
    const Floats shifted = V::sub(V::load(scores + j), V::all(top));
    const Floats weight = V::first(exp_of(shifted), seen - j, V::zero());
    total = V::add(total, weight);
    V::store(scores + j, weight);
  }
  V::store(values, total);
  for (const float value : values) sum += value;
  return sum;
}

void score_queries(const AttentionArgs& a, const Scratch& s, int64_t first, int64_t rows) {
  const int64_t D = a.head_size;
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t d = 0; d < D; ++d)
      s.queries[r * D + d] = r < rows ? widen(a.q[(first + r) * a.q_pitch + d]) * a.scale : 0.0f;
  Tile tile;
  for (int64_t key = 0; key < first + rows; key += kColumns) {
    multiply(s.queries, D, s.keys_by_lane + key * D, D, tile);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v)
        V::store(s.scores + r * s.keys + key + kLanes * v, tile[r][v]);
  }
}

void weigh_values(const AttentionArgs& a, const Scratch& s, int64_t first, int64_t rows,
                  const float* sums) {
  Tile tile;
  for (int64_t block = 0; block < s.columns; block += kColumns) {
    multiply(s.scores, s.keys, s.values_by_column + block * s.keys, first + rows, tile);
    for (int64_t r = 0; r < rows; ++r)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t column = block + kLanes * v, count = least(kLanes, a.head_size - column);
        if (count <= 0) continue;
        V::round_to(a.out + (first + r) * a.out_pitch + column,
                    V::div(tile[r][v], V::all(sums[r])), count);
      }
  }
}

void pack(const AttentionArgs* args, void* memory) {
  const Scratch s = lay_out(memory, args->tokens, args->head_size);
  pack_keys(*args, s);
  pack_values(*args, s);
}

void causal(const AttentionArgs* args, void* memory) {
  const AttentionArgs& a = *args;
  const Scratch s = lay_out(memory, a.tokens, a.head_size);
  for (int64_t first = 0; first < a.tokens; first += kRows) {
    const int64_t rows = least(kRows, a.tokens - first);
    score_queries(a, s, first, rows);
    float sums[kRows];
    for (int64_t r = 0; r < kRows; ++r)
      sums[r] = soften(s.scores + r * s.keys, r < rows ? first + r + 1 : 1, round_up(first + rows));
    weigh_values(a, s, first, rows, sums);
  }
}

int64_t scratch_bytes(int64_t tokens, int64_t head_size) {
  return (floats(tokens, head_size) * 4 + 63) / 64 * 64;
}

constexpr AttentionKernel kKernel = {&scratch_bytes, &pack, &causal};

}  // namespace
