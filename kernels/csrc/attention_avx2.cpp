// Causal attention of one head without 16-bit products: everything is float32 between reading
// bfloat16 and rounding the result, the weights of the second product too.
#include <immintrin.h>

#include "tokens.h"

namespace {

// 6 queries x 16 columns in 12 registers
constexpr int kRows = 6, kColumns = 16, kVectors = kColumns / 8;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t round_up(int64_t n) { return (n + kColumns - 1) / kColumns * kColumns; }

float widen(uint16_t value) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(value << 16))); }

// 8 values, rounded to the nearest even; a NaN stays one.
__m128i narrow(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i none = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i rounded = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, none), 16);
  const __m256i packed = _mm256_packus_epi32(rounded, rounded);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}

// e^x for x <= 0: Cephes' polynomial on [-ln 2 / 2, ln 2 / 2], below 2 units in the last place;
// below -87 it is about 1e-38
__m256 exp_of(__m256 x) {
  x = _mm256_max_ps(_mm256_set1_ps(-87.0f), x);  // this order keeps NaN
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  const float coefficients[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                                1.6666665459e-1f, 5.0000001201e-1f};
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  for (const float c : coefficients) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
  p = _mm256_fmadd_ps(_mm256_mul_ps(p, r), r, _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
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

// k [T, D] -> [blocks of 16 keys, D, 16 keys]
void pack_keys(const AttentionArgs& a, const Scratch& s) {
  for (int64_t key = 0; key < s.keys; ++key) {
    float* out = s.keys_by_lane + key / kColumns * kColumns * a.head_size + key % kColumns;
    const uint16_t* row = a.k + key * a.k_pitch;
    for (int64_t d = 0; d < a.head_size; ++d)
      out[d * kColumns] = key < a.tokens ? widen(row[d]) : 0.0f;
  }
}

// v [T, D] -> [blocks of 16 columns, T, 16 columns]
void pack_values(const AttentionArgs& a, const Scratch& s) {
  for (int64_t block = 0; block < s.columns; block += kColumns)
    for (int64_t t = 0; t < s.keys; ++t) {
      float* out = s.values_by_column + block * s.keys + t * kColumns;
      const uint16_t* row = a.v + t * a.v_pitch + block;
      for (int64_t c = 0; c < kColumns; ++c)
        out[c] = t < a.tokens && block + c < a.head_size ? widen(row[c]) : 0.0f;
    }
}

typedef __m256 Tile[kRows][kVectors];

// out[r][c] = sum over i of a[r][i] * b[i][c]
void multiply(const float* a, int64_t pitch, const float* b, int64_t count, Tile& out) {
  // a local array: the compiler must assume that `out` overlaps a or b
  Tile sum;
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_ps();
  for (int64_t i = 0; i < count; ++i, b += kColumns) {
    const __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m256 factor = _mm256_broadcast_ss(a + r * pitch + i);
      sum[r][0] = _mm256_fmadd_ps(factor, b0, sum[r][0]);
      sum[r][1] = _mm256_fmadd_ps(factor, b1, sum[r][1]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) out[r][0] = sum[r][0], out[r][1] = sum[r][1];
}

__m256i lanes(int64_t left) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)least(left, 8)), lane);
}

// One row of scores -> weights in their place, zero from `seen` on; returns their sum.
float soften(float* scores, int64_t seen, int64_t end) {
  const __m256 least_value = _mm256_set1_ps(-3.4e38f);
  __m256 most = least_value;
  for (int64_t j = 0; j < seen; j += 8) {
    const __m256 there = _mm256_castsi256_ps(lanes(seen - j));
    most = _mm256_max_ps(most, _mm256_blendv_ps(least_value, _mm256_loadu_ps(scores + j), there));
  }
  float values[8], top = -3.4e38f, sum = 0;
  _mm256_storeu_ps(values, most);
  for (const float value : values) top = value > top ? value : top;
  __m256 total = _mm256_setzero_ps();
  for (int64_t j = 0; j < end; j += 8) {
    const __m256 shifted = _mm256_sub_ps(_mm256_loadu_ps(scores + j), _mm256_set1_ps(top));
    const __m256 weight =
        _mm256_and_ps(_mm256_castsi256_ps(lanes(seen - j)), exp_of(shifted));
    total = _mm256_add_ps(total, weight);
    _mm256_storeu_ps(scores + j, weight);
  }
  _mm256_storeu_ps(values, total);
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
        _mm256_storeu_ps(s.scores + r * s.keys + key + 8 * v, tile[r][v]);
  }
}

void weigh_values(const AttentionArgs& a, const Scratch& s, int64_t first, int64_t rows,
                  const float* sums) {
  Tile tile;
  for (int64_t block = 0; block < s.columns; block += kColumns) {
    multiply(s.scores, s.keys, s.values_by_column + block * s.keys, first + rows, tile);
    for (int64_t r = 0; r < rows; ++r)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t column = block + 8 * v, count = least(8, a.head_size - column);
        if (count <= 0) continue;
        const __m128i value = narrow(_mm256_div_ps(tile[r][v], _mm256_set1_ps(sums[r])));
        __builtin_memcpy(a.out + (first + r) * a.out_pitch + column, &value, size_t(2 * count));
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

extern "C" const AttentionKernel* attention_avx2(void) { return &kKernel; }
