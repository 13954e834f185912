// Causal attention of one head with vdpbf16ps: scores and softmax in float32, the weights rounded
// to bfloat16 for the second product, as torch's own kernel rounds them.
#include <immintrin.h>

#include "tokens.h"

namespace {

// 6 queries x 64 columns in 24 registers
constexpr int kRows = 6, kColumns = 64, kVectors = kColumns / 16;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t round_up(int64_t n) { return (n + kColumns - 1) / kColumns * kColumns; }

__mmask16 lanes(int64_t left) {
  return left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
}

// e^x for x <= 0: Cephes' polynomial on [-ln 2 / 2, ln 2 / 2], below 2 units in the last place
__m512 exp_of(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-104.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  const float coefficients[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                                1.6666665459e-1f, 5.0000001201e-1f};
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (const float c : coefficients) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

// Where one head's working copies lie.
struct Scratch {
  int64_t keys, columns, pairs;  // T and D rounded up; D / 2
  uint32_t *keys_by_pair, *values_by_pair, *weights, *queries;
  float* scores;
};

int64_t words(int64_t tokens, int64_t head_size) {
  const int64_t keys = round_up(tokens), pairs = head_size / 2;
  return keys * pairs + keys / 2 * round_up(head_size) + kRows * (keys + keys / 2 + pairs);
}

Scratch lay_out(void* memory, int64_t tokens, int64_t head_size) {
  Scratch s{};
  s.keys = round_up(tokens), s.columns = round_up(head_size), s.pairs = head_size / 2;
  s.keys_by_pair = (uint32_t*)memory;
  s.values_by_pair = s.keys_by_pair + s.keys * s.pairs;
  s.scores = (float*)(s.values_by_pair + s.keys / 2 * s.columns);
  s.weights = (uint32_t*)(s.scores + kRows * s.keys);
  s.queries = s.weights + kRows * s.keys / 2;
  return s;
}

uint32_t pair_at(const uint16_t* row, int64_t pair) {
  return row[2 * pair] | (uint32_t)row[2 * pair + 1] << 16;
}

// k [T, D] -> [blocks of 64 keys, D / 2, 64 keys] of pairs along D
void pack_keys(const AttentionArgs& a, const Scratch& s) {
  for (int64_t key = 0; key < s.keys; ++key) {
    uint32_t* out = s.keys_by_pair + key / kColumns * kColumns * s.pairs + key % kColumns;
    for (int64_t pair = 0; pair < s.pairs; ++pair)
      out[pair * kColumns] = key < a.tokens ? pair_at(a.k + key * a.k_pitch, pair) : 0;
  }
}

// v [T, D] -> [blocks of 64 columns, T / 2, 64 columns] of pairs along T
void pack_values(const AttentionArgs& a, const Scratch& s) {
  for (int64_t block = 0; block < s.columns; block += kColumns)
    for (int64_t t = 0; t < s.keys; t += 2)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t column = block + 16 * v;
        const __mmask16 mask = lanes(a.head_size - column);
        const uint16_t* row = a.v + t * a.v_pitch + column;
        const __m256i none = _mm256_setzero_si256();
        const __m256i even = t < a.tokens ? _mm256_maskz_loadu_epi16(mask, row) : none;
        const __m256i odd =
            t + 1 < a.tokens ? _mm256_maskz_loadu_epi16(mask, row + a.v_pitch) : none;
        _mm512_storeu_si512(
            s.values_by_pair + block * (s.keys / 2) + t / 2 * kColumns + 16 * v,
            _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                            _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16)));
      }
}

typedef __m512 Tile[kRows][kVectors];

// out[r][c] = sum over pairs of a[r][pair] . b[pair][c]
void multiply(const uint32_t* a, int64_t pitch, const uint32_t* b, int64_t pairs, Tile& out) {
  // a local array: the compiler must assume that `out` overlaps a or b
  Tile sum;
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_setzero_ps();
  for (int64_t pair = 0; pair < pairs; ++pair, b += kColumns) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b);
    const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + 16);
    const __m512bh b2 = (__m512bh)_mm512_loadu_si512(b + 32);
    const __m512bh b3 = (__m512bh)_mm512_loadu_si512(b + 48);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m512bh w = (__m512bh)_mm512_set1_epi32((int)a[r * pitch + pair]);
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], w, b0);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], w, b1);
      sum[r][2] = _mm512_dpbf16_ps(sum[r][2], w, b2);
      sum[r][3] = _mm512_dpbf16_ps(sum[r][3], w, b3);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) out[r][v] = sum[r][v];
}

// One row of scores -> bfloat16 weights, zero from `seen` on; returns their sum before rounding.
float soften(const float* scores, int64_t seen, int64_t end, uint16_t* weights) {
  const __m512 least_value = _mm512_set1_ps(-3.4e38f);
  __m512 most = least_value;
  for (int64_t j = 0; j < seen; j += 16)
    most = _mm512_max_ps(most, _mm512_mask_loadu_ps(least_value, lanes(seen - j), scores + j));
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  __m512 sum = _mm512_setzero_ps();
  for (int64_t j = 0; j < end; j += 16) {
    const __m512 shifted = _mm512_sub_ps(_mm512_loadu_ps(scores + j), top);
    const __m512 weight = _mm512_maskz_mov_ps(lanes(seen - j), exp_of(shifted));
    sum = _mm512_add_ps(sum, weight);
    _mm256_storeu_si256((__m256i*)(weights + j), (__m256i)_mm512_cvtneps_pbh(weight));
  }
  return _mm512_reduce_add_ps(sum);
}

void score_queries(const AttentionArgs& a, const Scratch& s, int64_t first, int64_t rows) {
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t pair = 0; pair < s.pairs; ++pair)
      s.queries[r * s.pairs + pair] =
          r < rows ? pair_at(a.q + (first + r) * a.q_pitch, pair) : 0;
  const __m512 scale = _mm512_set1_ps(a.scale);
  Tile tile;
  for (int64_t key = 0; key < first + rows; key += kColumns) {
    multiply(s.queries, s.pairs, s.keys_by_pair + key * s.pairs, s.pairs, tile);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v)
        _mm512_storeu_ps(s.scores + r * s.keys + key + 16 * v, _mm512_mul_ps(tile[r][v], scale));
  }
}

void weigh_values(const AttentionArgs& a, const Scratch& s, int64_t first, int64_t rows,
                  const float* sums) {
  Tile tile;
  const int64_t pairs = round_up(first + rows) / 2;
  for (int64_t block = 0; block < s.columns; block += kColumns) {
    multiply(s.weights, s.keys / 2, s.values_by_pair + block * (s.keys / 2), pairs, tile);
    for (int64_t r = 0; r < rows; ++r)
      for (int v = 0; v < kVectors; ++v) {
        const __m512 value = _mm512_div_ps(tile[r][v], _mm512_set1_ps(sums[r]));
        const int64_t column = block + 16 * v;
        _mm256_mask_storeu_epi16(a.out + (first + r) * a.out_pitch + column,
                                 lanes(a.head_size - column), (__m256i)_mm512_cvtneps_pbh(value));
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
      sums[r] = soften(s.scores + r * s.keys, r < rows ? first + r + 1 : 1,
                       round_up(first + rows), (uint16_t*)(s.weights + r * (s.keys / 2)));
    weigh_values(a, s, first, rows, sums);
  }
}

int64_t scratch_bytes(int64_t tokens, int64_t head_size) { return words(tokens, head_size) * 4; }

constexpr AttentionKernel kKernel = {&scratch_bytes, &pack, &causal};

}  // namespace

extern "C" const AttentionKernel* attention_avx512bf16(void) { return &kKernel; }
