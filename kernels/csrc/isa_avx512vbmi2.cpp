// AVX-512 with VBMI2 (expand of 16-bit lanes): bf16 is expanded, then multiplied as floats.
//
// Also the faster way where there are dot products of bf16 pairs, on Intel's cores: there one takes
// two cycles of the port that expands, and multiply-adds have two ports (measured on Emerald
// Rapids, eval/reports/LOG.md).
#include "avx512vbmi2.h"
#include "tokens.h"

namespace {

// 32 bf16 as floats: those of even lanes, and those of odd lanes.
struct Parted {
  __m512 even, odd;
};

INLINE Parted as_floats(__m512i halves) {
  const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
  return Parted{_mm512_castsi512_ps(_mm512_slli_epi32(halves, 16)),
                _mm512_castsi512_ps(_mm512_and_si512(halves, upper))};
}

struct BF16 : HalfWords {
  typedef float X;
  enum { kTileRows = 4 };
  // of 32 columns the even ones come first
  static INLINE int64_t place(int64_t c) { return c / 32 * 32 + c % 2 * 16 + c % 32 / 2; }
  static INLINE Acc fma(Acc acc, W w, const X* x) {
    const Parted low = as_floats(w.low), high = as_floats(w.high);
    acc = _mm512_fmadd_ps(low.even, _mm512_loadu_ps(x), acc);
    acc = _mm512_fmadd_ps(low.odd, _mm512_loadu_ps(x + 16), acc);
    acc = _mm512_fmadd_ps(high.even, _mm512_loadu_ps(x + 32), acc);
    return _mm512_fmadd_ps(high.odd, _mm512_loadu_ps(x + 48), acc);
  }
  static INLINE float to_float(Elem value) { return bf16_to_float(value); }
  static INLINE Elem from_float(float value) { return float_to_bf16(value); }
};

template <> struct Unit<BF16> {
  typedef Parted W;
  enum { kCols = 32 };
  static INLINE W load(const uint16_t* p) { return as_floats(_mm512_loadu_si512(p)); }
  static INLINE __m512 fma(__m512 acc, W w, const float* x) {
    acc = _mm512_fmadd_ps(w.even, _mm512_loadu_ps(x), acc);
    return _mm512_fmadd_ps(w.odd, _mm512_loadu_ps(x + 16), acc);
  }
};

// Sums lie as the floats do: of 32 outputs the even ones first.
template <> struct Columns<BF16> {
  static INLINE void ordered(const float* sums, float* out) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    UNROLL for (int c = 0; c < kWord; c += 32) {
      const __m512 even = _mm512_loadu_ps(sums + c), odd = _mm512_loadu_ps(sums + c + 16);
      _mm512_storeu_ps(out + c, _mm512_permutex2var_ps(even, low, odd));
      _mm512_storeu_ps(out + c + 16, _mm512_permutex2var_ps(even, high, odd));
    }
  }
};

// Sums of a word stay in registers while channel after channel is added; those of more than two rows
// only half a word at a time. Each half of a mask goes from memory to a mask register. Memory is asked
// for a line at a time between the channels: many requests at once hold up loads (measured).
template <bool Packed, int B> struct Word<BF16, Packed, B> {
  enum { kHalves = B > 2 ? 1 : 2 };  // at a time
  static INLINE Parted weights(const char* mask, const char* values) {
    __m512i found = load_apart(values);
    if (Packed)
      found = _mm512_maskz_expand_epi16(_load_mask32((__mmask32*)mask), found);
    return as_floats(found);
  }
  template <Side side>
  static INLINE void add(const char** at, const char* const* ahead, Due due, const float* x,
                         float* sums, int64_t pitch) {
    UNROLL for (int first = 0; first < 2; first += kHalves) {
      const bool last = first + kHalves == 2;
      Parted sum[B][kHalves];
      UNROLL for (int b = 0; b < B; ++b) {
        UNROLL for (int h = 0; h < kHalves; ++h) {
          const float* place = sums + b * pitch + 32 * (first + h);
          sum[b][h] = Parted{_mm512_loadu_ps(place), _mm512_loadu_ps(place + 16)};
        }
      }
      UNROLL for (int k = 0; k < kGroup; ++k) {
        const int64_t line = due.from + kLine * first;
        if (line < due.until) fetch_line<BF16, side>(ahead[k], line);
        if (last) Fetch<BF16>::near<side>(at[k]);
        const char* mask = side == kBack && Packed ? at[k] - kMaskBytes : at[k];
        const int64_t low = 2 * (Packed ? __builtin_popcount(bits_at<uint32_t>(mask)) : 32);
        const int64_t all = 2 * (Packed ? __builtin_popcountll(bits_at<uint64_t>(mask)) : 64);
        const char* values = side == kBack ? mask - all : Packed ? mask + kMaskBytes : mask;
        if (last) at[k] = side == kBack ? values : values + all;
        Parted w[kHalves];
        UNROLL for (int h = 0; h < kHalves; ++h) {
          w[h] = weights(mask + 4 * (first + h), values + low * (first + h));
        }
        UNROLL for (int b = 0; b < B; ++b) {
          const __m512 factor = _mm512_set1_ps(x[(k / 2 * B + b) * 2 + k % 2]);
          UNROLL for (int h = 0; h < kHalves; ++h) {
            sum[b][h].even = _mm512_fmadd_ps(w[h].even, factor, sum[b][h].even);
            sum[b][h].odd = _mm512_fmadd_ps(w[h].odd, factor, sum[b][h].odd);
          }
        }
        if (kHalves == 2 && line + kLine < due.until)
          fetch_line<BF16, side>(ahead[k], line + kLine);
      }
      UNROLL for (int b = 0; b < B; ++b) {
        UNROLL for (int h = 0; h < kHalves; ++h) {
          float* place = sums + b * pitch + 32 * (first + h);
          _mm512_storeu_ps(place, sum[b][h].even);
          _mm512_storeu_ps(place + 16, sum[b][h].odd);
        }
      }
    }
    for (due.from += 2 * kLine; due.from < due.until; due.from += kLine)
      UNROLL for (int k = 0; k < kGroup; ++k) fetch_line<BF16, side>(ahead[k], due.from);
  }
};

template <> struct Select<BF16> : Select<FloatPairs<BF16Lanes>> {};

constexpr Isa kTable = avx512_table<BF16>("avx512vbmi2", nullptr, &attention_avx512);

}  // namespace

extern "C" const Isa* isa_avx512vbmi2(void) { return &kTable; }
