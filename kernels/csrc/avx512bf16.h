// What the translation units with BF16 (dot product of bf16 pairs) share.
#pragma once

#include "avx512vbmi2.h"

namespace {

struct BF16 : HalfWords {
  typedef uint16_t X;
  static INLINE Acc fma(Acc acc, W w, const X* x) {
    acc = _mm512_dpbf16_ps(acc, (__m512bh)_mm512_loadu_si512(x), (__m512bh)w.low);
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_loadu_si512(x + 32), (__m512bh)w.high);
  }
  struct Sums {
    __m512 part[4];
  };
  static INLINE Sums load_sums(const float* p) {
    return Sums{{_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16), _mm512_loadu_ps(p + 32),
                 _mm512_loadu_ps(p + 48)}};
  }
  static INLINE void store_sums(float* p, Sums sums) {
    UNROLL for (int i = 0; i < 4; ++i) _mm512_storeu_ps(p + 16 * i, sums.part[i]);
  }
  static INLINE float to_float(Elem value) { return bf16_to_float(value); }
  static INLINE Elem from_float(float value) { return float_to_bf16(value); }
};

template <> struct Unit<BF16> {
  typedef __m512i W;
  enum { kCols = 32 };
  static INLINE W load(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static INLINE __m512 fma(__m512 acc, W w, const uint16_t* x) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_loadu_si512(x), (__m512bh)w);
  }
};

// Two channels' weights are interleaved, so that one dot product of pairs adds both: a register then
// holds the outputs 0-3, 8-11, 16-19, 24-27 of its 32, or the others.
template <> struct Columns<BF16> {
  typedef BF16::Sums Sums;
  struct Mix {
    __m512i part[4];
  };
  static INLINE Mix mix(BF16::W a, BF16::W b) {
    return Mix{{_mm512_unpacklo_epi16(a.low, b.low), _mm512_unpackhi_epi16(a.low, b.low),
                _mm512_unpacklo_epi16(a.high, b.high), _mm512_unpackhi_epi16(a.high, b.high)}};
  }
  static INLINE Sums fma(Sums sums, const Mix& mix, const uint16_t* x) {
    const __m512bh pair = (__m512bh)_mm512_set1_epi32(load_word<int32_t>((const uint8_t*)x));
    UNROLL for (int i = 0; i < 4; ++i)
      sums.part[i] = _mm512_dpbf16_ps(sums.part[i], (__m512bh)mix.part[i], pair);
    return sums;
  }
  static INLINE void ordered(const float* sums, float* out) {
    UNROLL for (int o = 0; o < kWord; o += 4) {
      const int from = o / 32 * 32 + o % 8 / 4 * 16 + o % 32 / 8 * 4;
      __builtin_memcpy(out + o, sums + from, 16);
    }
  }
};

// A mask goes from memory to a mask register, and once more to a general one for counting: accesses
// of the first cache are what limits this kernel.
template <int B> struct Word<BF16, true, B> {
  static INLINE BF16::W next(const char* mask, const char* values, int64_t low) {
    const __mmask64 lanes = _load_mask64((__mmask64*)mask);
    const __mmask32 upper = (__mmask32)_kshiftri_mask64(lanes, 32);
    return BF16::W{_mm512_maskz_expand_epi16((__mmask32)lanes, load_apart(values)),
                   _mm512_maskz_expand_epi16(upper, load_apart(values + low))};
  }
  template <Side side>
  static INLINE void add(const char** at, const char* const* ahead, Due due, const uint16_t* x,
                         float* sums, int64_t pitch) {
    fetch<BF16, side>(at, ahead, due);
    Columns<BF16>::Mix mix[kGroup / 2];
    UNROLL for (int k = 0; k < kGroup; k += 2) {
      BF16::W w[2];
      UNROLL for (int j = 0; j < 2; ++j) {
        const char* mask = side == kFront ? at[k + j] : at[k + j] - kMaskBytes;
        const uint64_t bits = bits_at<uint64_t>(mask);
        const int64_t low = 2 * __builtin_popcount((uint32_t)bits);
        const int64_t bytes = 2 * __builtin_popcountll(bits);
        const char* values = side == kFront ? mask + kMaskBytes : mask - bytes;
        at[k + j] = side == kFront ? values + bytes : values;
        w[j] = next(mask, values, low);
      }
      mix[k / 2] = Columns<BF16>::mix(w[0], w[1]);
    }
    UNROLL for (int b = 0; b < B; ++b) {
      float* place = sums + b * pitch;
      BF16::Sums sum = BF16::load_sums(place);
      UNROLL for (int p = 0; p < kGroup / 2; ++p)
        sum = Columns<BF16>::fma(sum, mix[p], x + (p * B + b) * 2);
      BF16::store_sums(place, sum);
    }
  }
};

template <> struct Select<BF16> {
  static void run(const SelectArgs* a, ChannelList* list) {
    uint16_t* values = (uint16_t*)list->values;
    select_lanes<BF16Lanes>(a, list,
                            [=](__m512 kept, int64_t n) { BF16Lanes::store(kept, values + n); });
  }
};

}  // namespace
