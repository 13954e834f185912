// AVX-512 F, BW, VL, DQ.
#include <immintrin.h>
#include <stdint.h>

namespace {

struct V {
  typedef __m512 Floats;
  enum { kLanes = 16, kVectors = 4 };
  static __mmask16 lanes(int64_t n) {
    return (__mmask16)_bzhi_u32(0xffff, n < 0 ? 0 : n > 16 ? 16 : (unsigned)n);
  }
  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats all(float value) { return _mm512_set1_ps(value); }
  static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static Floats nearest(Floats v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Floats times_power(Floats v, Floats n) { return _mm512_scalef_ps(v, n); }
  static Floats first(Floats v, int64_t n, Floats other) {
    return _mm512_mask_mov_ps(other, lanes(n), v);
  }
  static void round_to(uint16_t* p, Floats v, int64_t n) {
    const __m512i bits = _mm512_castps_si512(v), one = _mm512_set1_epi32(1);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __m512i rounded =
        _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
    const __m256i value = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    _mm256_mask_storeu_epi16(p, lanes(n), value);
  }
};

}  // namespace

#include "attention_loops.h"

extern "C" const AttentionKernel* attention_avx512(void) { return &kKernel; }
