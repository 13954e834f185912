// What the AVX-512 translation units share: weights expanded as float32 lanes.
#pragma once

#include <immintrin.h>

#include "channel_loops.h"
#include "decode_loops.h"
#include "rows.h"

namespace {

INLINE float f16_to_float(uint16_t bits) { return _cvtsh_ss(bits); }
INLINE uint16_t float_to_f16(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }

// The first n of 16 or 32 lanes; none below 0, all above.
INLINE __mmask16 first_16(int64_t n) {
  return (__mmask16)_bzhi_u32(0xffff, n < 0 ? 0 : n > 16 ? 16 : (unsigned)n);
}
INLINE __mmask32 first_32(int64_t n) {
  return (__mmask32)_bzhi_u32(~0u, n < 0 ? 0 : n > 32 ? 32 : (unsigned)n);
}

struct FloatAccumulator {
  typedef __m512 Acc;
  enum { kTileRows = 6, kTileInputs = 4, kExpandRows = 4, kExpandInputs = 4 };
  static constexpr int kRows(int batch, bool sparse) {
    return batch == 1 ? (sparse ? 3 : 2) : batch <= 4 ? 4 : batch <= 6 ? 3 : 2;
  }
  static INLINE int64_t place(int64_t c) { return c; }
  static INLINE Acc zero() { return _mm512_setzero_ps(); }
  static INLINE Acc add(Acc a, Acc b) { return _mm512_add_ps(a, b); }
  static INLINE float reduce(Acc acc) { return _mm512_reduce_add_ps(acc); }
  // Lanes are added in the order of reduce: 8 apart, 4 apart, 2 apart, neighbours.
  enum { kReduced = 16 };
  static INLINE void reduce_many(const Acc* accs, float* out) {
    __m512 halves[8], quarters[4], pairs[2];
    UNROLL for (int i = 0; i < 8; ++i)
      halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(accs[i], accs[i + 8], 0x44),
                                _mm512_shuffle_f32x4(accs[i], accs[i + 8], 0xEE));
    UNROLL for (int i = 0; i < 4; ++i)
      quarters[i] = _mm512_add_ps(_mm512_shuffle_f32x4(halves[i], halves[i + 4], 0x88),
                                  _mm512_shuffle_f32x4(halves[i], halves[i + 4], 0xDD));
    UNROLL for (int i = 0; i < 2; ++i)
      pairs[i] = _mm512_add_ps(_mm512_shuffle_ps(quarters[2 * i], quarters[2 * i + 1], 0x44),
                               _mm512_shuffle_ps(quarters[2 * i], quarters[2 * i + 1], 0xEE));
    const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(pairs[0], pairs[1], 0x88),
                                      _mm512_shuffle_ps(pairs[0], pairs[1], 0xDD));
    _mm512_storeu_ps(out, _mm512_shuffle_f32x4(sums, sums, 0xD8));
  }
};

struct BF16Lanes {
  typedef uint16_t Elem;
  static INLINE __m512 widen(__m256i values) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
  }
  static INLINE __m512 load(const Elem* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
  static INLINE __m512 load_exact(const Elem* p, int64_t n) {
    return widen(_mm256_maskz_loadu_epi16(first_16(n), p));
  }
  static INLINE void store(__m512 w, Elem* p) {
    const __m512i upper = _mm512_srli_epi32(_mm512_castps_si512(w), 16);
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(upper));
  }
  static INLINE float to_float(Elem value) { return bf16_to_float(value); }
  static INLINE Elem from_float(float value) { return float_to_bf16(value); }
};

struct F16Lanes {
  typedef uint16_t Elem;
  static INLINE __m512 load(const Elem* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  }
  static INLINE __m512 load_exact(const Elem* p, int64_t n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_16(n), p));
  }
  static INLINE void store(__m512 w, Elem* p) {
    const int rounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(w, rounding));
  }
  static INLINE float to_float(Elem value) { return f16_to_float(value); }
  static INLINE Elem from_float(float value) { return float_to_f16(value); }
};

struct F32Lanes {
  typedef float Elem;
  static INLINE __m512 load(const Elem* p) { return _mm512_loadu_ps(p); }
  static INLINE __m512 load_exact(const Elem* p, int64_t n) {
    return _mm512_maskz_loadu_ps(first_16(n), p);
  }
  static INLINE void store(__m512 w, Elem* p) { _mm512_storeu_ps(p, w); }
  static INLINE float to_float(Elem value) { return value; }
  static INLINE Elem from_float(float value) { return value; }
};

// The policy that needs AVX-512 F, BW, VL and DQ only: Lanes loads 16 elements as floats, an
// expand of 32-bit lanes spreads them; 32 columns per step, so that one move fills two masks.
template <class Lanes> struct FloatPairs : FloatAccumulator {
  typedef typename Lanes::Elem Elem;
  typedef float X;
  struct W {
    __m512 low, high;
  };
  enum { kCols = 32 };
  static INLINE W spread(uint32_t mask, __m512 low, __m512 high) {
    const __mmask32 lanes = _cvtu32_mask32(mask);
    const __mmask16 upper = (__mmask16)_kshiftri_mask32(lanes, 16);
    return W{_mm512_maskz_expand_ps((__mmask16)lanes, low), _mm512_maskz_expand_ps(upper, high)};
  }
  static INLINE W expand(uint32_t mask, const Elem* p) {
    __m512 low = Lanes::load(p);
    __m512 high = Lanes::load(p + __builtin_popcount(mask & 0xffff));
    // loads apart: the memory form of the expand is slower on Zen 4
    asm("" : "+v"(low), "+v"(high));
    return spread(mask, low, high);
  }
  static INLINE W expand_exact(uint32_t mask, const Elem* p) {
    const int low = __builtin_popcount(mask & 0xffff), high = __builtin_popcount(mask >> 16);
    return spread(mask, Lanes::load_exact(p, low), Lanes::load_exact(p + low, high));
  }
  static INLINE W load(const Elem* p) { return W{Lanes::load(p), Lanes::load(p + 16)}; }
  static INLINE W load_exact(const Elem* p, int64_t n) {
    return W{Lanes::load_exact(p, n), Lanes::load_exact(p + 16, n - 16)};
  }
  static INLINE Acc fma(Acc acc, W w, const X* x) {
    acc = _mm512_fmadd_ps(w.low, _mm512_loadu_ps(x), acc);
    return _mm512_fmadd_ps(w.high, _mm512_loadu_ps(x + 16), acc);
  }
  typedef W Sums;
  static INLINE Sums load_sums(const float* p) {
    return W{_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)};
  }
  static INLINE void store_sums(float* p, Sums sums) {
    _mm512_storeu_ps(p, sums.low);
    _mm512_storeu_ps(p + 16, sums.high);
  }
  static INLINE Sums axpy(Sums sums, W w, float x) {
    const __m512 factor = _mm512_set1_ps(x);
    return W{_mm512_fmadd_ps(w.low, factor, sums.low), _mm512_fmadd_ps(w.high, factor, sums.high)};
  }
  static INLINE void store(W w, Elem* p) {
    Lanes::store(w.low, p);
    Lanes::store(w.high, p + 16);
  }
  static INLINE float to_float(Elem value) { return Lanes::to_float(value); }
  static INLINE Elem from_float(float value) { return Lanes::from_float(value); }
};

template <class Lanes> struct Unit<FloatPairs<Lanes>> {
  typedef __m512 W;
  enum { kCols = 16 };
  static INLINE W load(const typename Lanes::Elem* p) { return Lanes::load(p); }
  static INLINE __m512 fma(__m512 acc, W w, const float* x) {
    return _mm512_fmadd_ps(w, _mm512_loadu_ps(x), acc);
  }
};

// Which of 16 inputs count (see counts in channel_loops.h), the first n of them real.
INLINE __mmask16 counting(__m512 x, const float* scales, float threshold, __mmask16 real) {
  __m512 score = _mm512_abs_ps(x);
  if (scales) score = _mm512_mul_ps(score, _mm512_maskz_loadu_ps(real, scales));
  return _mm512_mask_cmp_ps_mask(real, score, _mm512_set1_ps(threshold), _CMP_NLE_UQ);
}

// The register form of the compress: the memory form is microcode on Zen 4.
template <class Lanes, class Store>
INLINE void select_lanes(const SelectArgs* a, ChannelList* list, Store store) {
  const typename Lanes::Elem* x = (const typename Lanes::Elem*)a->x;
  const __m512i steps =
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t n = 0;
  for (int64_t i = 0; i < a->in_features; i += 16) {
    const int64_t left = a->in_features - i;
    const __m512 value = left >= 16 ? Lanes::load(x + i) : Lanes::load_exact(x + i, left);
    const __mmask16 kept =
        counting(value, a->scales ? a->scales + i : nullptr, a->thresholds[0], first_16(left));
    const __m512i channel = _mm512_add_epi32(steps, _mm512_set1_epi32((int)i));
    _mm512_storeu_si512(list->channels + n, _mm512_maskz_compress_epi32(kept, channel));
    store(_mm512_maskz_compress_ps(kept, value), n);
    n += __builtin_popcount(kept);
  }
  list->active = n;
}

template <class Lanes> struct Select<FloatPairs<Lanes>> {
  static void run(const SelectArgs* a, ChannelList* list) {
    float* values = (float*)list->values;
    select_lanes<Lanes>(a, list, [=](__m512 kept, int64_t n) { _mm512_storeu_ps(values + n, kept); });
  }
};

// The kernels of an instruction set; they differ in how bfloat16 is multiplied: P.
template <class P>
constexpr Isa avx512_table(const char* name, const GramKernel* (*gram)(void),
                           const AttentionKernel* (*attention)(void)) {
  return Isa{name,
             {linear_kernel<P>(), linear_kernel<FloatPairs<F16Lanes>>(),
              linear_kernel<FloatPairs<F32Lanes>>()},
             {decode_kernel<DecodeBF16<8>>(),
              decode_kernel<Scalars<uint16_t, f16_to_float, float_to_f16, 8>>(),
              decode_kernel<DecodeF32<8>>()},
             {channel_kernel<P>(), channel_kernel<FloatPairs<F16Lanes>>(),
              channel_kernel<FloatPairs<F32Lanes>>()},
             gram,
             attention};
}

}  // namespace
