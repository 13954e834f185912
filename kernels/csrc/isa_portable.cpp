// Plain C++ for any machine: the kept values of 64 columns are scattered into a buffer of floats,
// then multiplied by loops that a compiler vectorises.
#include "channel_loops.h"

namespace {

INLINE float f16_to_float(uint16_t bits) {
  const uint32_t sign = (uint32_t)(bits & 0x8000) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1f, fraction = bits & 0x3ff;
  uint32_t wide = sign | ((exponent + 112) << 23) | (fraction << 13);
  float value;
  if (exponent == 0x1f) wide = sign | 0x7f800000u | (fraction << 13);
  if (exponent == 0) {
    value = (float)fraction * 0x1p-24f;
    return sign ? -value : value;
  }
  __builtin_memcpy(&value, &wide, 4);
  return value;
}

// Round to nearest even. Below the normal range the sum with 0.5 leaves the rounded subnormal in
// the low bits; above it the result is infinity.
INLINE uint16_t float_to_f16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
  if (bits >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);
  if (bits < 0x38800000u) {
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    __builtin_memcpy(&bits, &magnitude, 4);
    return (uint16_t)(sign | (bits - 0x3f000000u));
  }
  return (uint16_t)(sign | ((bits - 0x38000000u + 0xfff + ((bits >> 13) & 1)) >> 13));
}

enum { kLanes = 16 };

template <class Stored, float (*Load)(Stored), Stored (*Store)(float)> struct Portable {
  typedef Stored Elem;
  typedef float X;
  enum { kCols = 64 };
  struct W {
    float lane[kCols];
  };
  struct Acc {
    float lane[kLanes];
  };
  static constexpr int kRows(int, bool) { return 1; }
  enum { kTileRows = 1, kTileInputs = 2, kExpandRows = 1, kExpandInputs = 2 };
  static INLINE int64_t place(int64_t c) { return c; }
  static INLINE Acc zero() { return Acc{}; }
  static INLINE Acc add(Acc a, Acc b) {
    for (int lane = 0; lane < kLanes; ++lane) a.lane[lane] += b.lane[lane];
    return a;
  }
  static INLINE W expand_exact(uint64_t mask, const Elem* p) {
    W w = {};
    for (; mask; mask &= mask - 1) w.lane[__builtin_ctzll(mask)] = Load(*p++);
    return w;
  }
  static INLINE W expand(uint64_t mask, const Elem* p) { return expand_exact(mask, p); }
  static INLINE W load(const Elem* p) { return load_exact(p, kCols); }
  static INLINE W load_exact(const Elem* p, int64_t n) {
    W w = {};
    for (int64_t c = 0; c < n; ++c) w.lane[c] = Load(p[c]);
    return w;
  }
  static INLINE Acc fma(Acc acc, const W& w, const X* x) {
    for (int c = 0; c < kCols; c += kLanes)
      for (int lane = 0; lane < kLanes; ++lane)
        acc.lane[lane] += w.lane[c + lane] * x[c + lane];
    return acc;
  }
  typedef W Sums;
  static INLINE Sums load_sums(const float* p) {
    Sums sums;
    __builtin_memcpy(&sums, p, sizeof sums);
    return sums;
  }
  static INLINE void store_sums(float* p, const Sums& sums) {
    __builtin_memcpy(p, &sums, sizeof sums);
  }
  static INLINE Sums axpy(Sums sums, const W& w, float x) {
    for (int c = 0; c < kCols; ++c) sums.lane[c] += w.lane[c] * x;
    return sums;
  }
  static INLINE float reduce(Acc acc) {
    for (int half = kLanes / 2; half; half /= 2)
      for (int lane = 0; lane < half; ++lane) acc.lane[lane] += acc.lane[lane + half];
    return acc.lane[0];
  }
  enum { kReduced = 1 };
  static INLINE void reduce_many(const Acc* accs, float* out) { *out = reduce(*accs); }
  static INLINE void store(const W& w, Elem* p) {
    for (int c = 0; c < kCols; ++c) p[c] = Store(w.lane[c]);
  }
  static INLINE float to_float(Elem value) { return Load(value); }
  static INLINE Elem from_float(float value) { return Store(value); }
};

INLINE float identity(float value) { return value; }

constexpr Isa kTable = {
    "portable",
    {linear_kernel<Portable<uint16_t, bf16_to_float, float_to_bf16>>(),
     linear_kernel<Portable<uint16_t, f16_to_float, float_to_f16>>(),
     linear_kernel<Portable<float, identity, identity>>()},
    {decode_kernel<DecodeBF16<2>>(),
     decode_kernel<Scalars<uint16_t, f16_to_float, float_to_f16, 2>>(),
     decode_kernel<DecodeF32<2>>()},
    {channel_kernel<Portable<uint16_t, bf16_to_float, float_to_bf16>>(),
     channel_kernel<Portable<uint16_t, f16_to_float, float_to_f16>>(),
     channel_kernel<Portable<float, identity, identity>>()},
};

}  // namespace

extern "C" const Isa* isa_portable(void) { return &kTable; }
