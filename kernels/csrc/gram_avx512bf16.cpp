// C += A^T B with vdpbf16ps: two tokens at a time, products exact, sums in float32.
#include <immintrin.h>

#include "tokens.h"

namespace {

// 8 rows x 48 columns of C in 24 registers
constexpr int kRows = 8, kVectors = kGramPanel / 16;
// pairs of tokens after which sums go to memory: a panel of as many stays in the caches
constexpr int64_t kPairs = 256;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

__mmask16 lanes(int64_t left) {
  return left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
}

void pack(const uint16_t* x, int64_t tokens, int64_t width, int64_t panel, uint32_t* packed) {
  const int64_t pairs = (tokens + 1) / 2, first = panel * kGramPanel;
  uint32_t* out = packed + panel * pairs * kGramPanel;
  for (int64_t pair = 0; pair < pairs; ++pair, out += kGramPanel) {
    const uint16_t* even = x + 2 * pair * width + first;
    const bool both = 2 * pair + 1 < tokens;
    for (int v = 0; v < kVectors; ++v) {
      const __mmask16 mask = lanes(width - first - 16 * v);
      const __m256i low = _mm256_maskz_loadu_epi16(mask, even + 16 * v);
      const __m256i high =
          both ? _mm256_maskz_loadu_epi16(mask, even + width + 16 * v) : _mm256_setzero_si256();
      _mm512_storeu_si512(out + 16 * v,
                          _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                                          _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)));
    }
  }
}

void tile(const uint32_t* a, const uint32_t* b, int64_t pairs, float* sum, int64_t pitch,
          int64_t rows, int64_t columns) {
  __m512 acc[kRows][kVectors];
  for (auto& row : acc)
    for (auto& value : row) value = _mm512_setzero_ps();
  for (int64_t pair = 0; pair < pairs; ++pair, a += kGramPanel, b += kGramPanel) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b);
    const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + 16);
    const __m512bh b2 = (__m512bh)_mm512_loadu_si512(b + 32);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512bh w = (__m512bh)_mm512_set1_epi32((int)a[r]);
      acc[r][0] = _mm512_dpbf16_ps(acc[r][0], w, b0);
      acc[r][1] = _mm512_dpbf16_ps(acc[r][1], w, b1);
      acc[r][2] = _mm512_dpbf16_ps(acc[r][2], w, b2);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
    for (int v = 0; v < kVectors; ++v) {
      const __mmask16 mask = lanes(columns - 16 * v);
      float* out = sum + r * pitch + 16 * v;
      const __m512 before = _mm512_maskz_loadu_ps(mask, out);
      _mm512_mask_storeu_ps(out, mask, _mm512_add_ps(before, acc[r][v]));
    }
  }
}

void add(const uint32_t* a, const uint32_t* b, int64_t tokens, int64_t height, int64_t width,
         int64_t panel, int64_t panels, float* sum) {
  const int64_t pairs = (tokens + 1) / 2, stride = pairs * kGramPanel;
  const int64_t end = least(height, (panel + 1) * kGramPanel);
  for (int64_t start = 0; start < pairs; start += kPairs) {
    const int64_t count = least(kPairs, pairs - start);
    for (int64_t other = 0; other < panels; ++other) {
      const int64_t column = other * kGramPanel;
      for (int64_t row = panel * kGramPanel; row < end; row += kRows) {
        tile(a + panel * stride + start * kGramPanel + row % kGramPanel,
             b + other * stride + start * kGramPanel, count,
             sum + row * width + column, width, least(kRows, end - row),
             least(kGramPanel, width - column));
      }
    }
  }
}

constexpr GramKernel kKernel = {&pack, &add};

}  // namespace

extern "C" const GramKernel* gram_avx512bf16(void) { return &kKernel; }
