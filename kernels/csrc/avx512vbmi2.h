// What the AVX-512 translation units with VBMI2 share: 16-bit weights expanded as they are.
#pragma once

#include "avx512.h"

namespace {

// The load as an instruction of its own: compilers would fold it into the memory form of the
// expand, which is slower on Zen 4 (measured).
INLINE __m512i load_apart(const void* p) {
  __m512i values = _mm512_loadu_si512(p);
  asm("" : "+v"(values));
  return values;
}

INLINE __m512i load_lanes(const uint16_t* p, int64_t n) {
  return _mm512_maskz_loadu_epi16(first_32(n), p);
}

// Mask bits of a word, for counting: a load of its own, so that the compiler does not take them from
// the mask register, which costs a port that multiplies.
template <class Bits> INLINE Bits bits_at(const char* mask) {
  Bits bits = load_word<Bits>((const uint8_t*)mask);
  asm("" : "+r"(bits));
  return bits;
}

// 64 kept 16-bit values at a time, in two registers: one move of 64 mask bits to a mask register
// and a shift cost less than two moves of 32 (measured: 0.95 against 1.36 ns for 32 columns).
struct HalfWords : FloatAccumulator {
  typedef uint16_t Elem;
  struct W {
    __m512i low, high;
  };
  enum { kCols = 64 };
  static INLINE W spread(uint64_t mask, __m512i low, __m512i high) {
    const __mmask64 lanes = _cvtu64_mask64(mask);
    const __mmask32 upper = (__mmask32)_kshiftri_mask64(lanes, 32);
    return W{_mm512_maskz_expand_epi16((__mmask32)lanes, low),
             _mm512_maskz_expand_epi16(upper, high)};
  }
  static INLINE W expand(uint64_t mask, const Elem* p) {
    return spread(mask, load_apart(p), load_apart(p + __builtin_popcount((uint32_t)mask)));
  }
  static INLINE W expand_exact(uint64_t mask, const Elem* p) {
    const int low = __builtin_popcount((uint32_t)mask);
    const int high = __builtin_popcount((uint32_t)(mask >> 32));
    return spread(mask, load_lanes(p, low), load_lanes(p + low, high));
  }
  static INLINE W load(const Elem* p) {
    return W{_mm512_loadu_si512(p), _mm512_loadu_si512(p + 32)};
  }
  static INLINE W load_exact(const Elem* p, int64_t n) {
    return W{load_lanes(p, n), load_lanes(p + 32, n - 32)};
  }
  static INLINE void store(W w, Elem* p) {
    _mm512_storeu_si512(p, w.low);
    _mm512_storeu_si512(p + 32, w.high);
  }
};

}  // namespace
