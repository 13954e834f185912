// AArch64 NEON. There is no expand instruction: a table turns mask bits into a byte lookup.
#include <arm_neon.h>

#include "channel_loops.h"

namespace {

INLINE float f16_to_float(uint16_t bits) {
  __fp16 half;
  __builtin_memcpy(&half, &bits, 2);
  return (float)half;
}

INLINE uint16_t float_to_f16(float value) {
  const __fp16 half = (__fp16)value;
  uint16_t bits;
  __builtin_memcpy(&bits, &half, 2);
  return bits;
}

// Byte lookups that spread 16-bit values to the 8 bits of a mask, or 32-bit values to 4 bits;
// 0xff is out of range and writes a zero.
struct Tables {
  alignas(64) uint8_t words[256][16];
  alignas(64) uint8_t lanes[16][16];
};

constexpr Tables make_tables() {
  Tables tables = {};
  for (int mask = 0; mask < 256; ++mask) {
    int source = 0;
    for (int bit = 0; bit < 8; ++bit) {
      const bool kept = mask >> bit & 1;
      for (int byte = 0; byte < 2; ++byte)
        tables.words[mask][2 * bit + byte] = kept ? (uint8_t)(2 * source + byte) : 0xff;
      source += kept;
    }
  }
  for (int mask = 0; mask < 16; ++mask) {
    int source = 0;
    for (int bit = 0; bit < 4; ++bit) {
      const bool kept = mask >> bit & 1;
      for (int byte = 0; byte < 4; ++byte)
        tables.lanes[mask][4 * bit + byte] = kept ? (uint8_t)(4 * source + byte) : 0xff;
      source += kept;
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

// 8 columns per step, in two halves of 4 lanes.
struct FloatAccumulator {
  typedef float X;
  struct Acc {
    float32x4_t low, high;
  };
  enum { kCols = 8 };
  static constexpr int kRows(int batch, bool) { return batch == 1 ? 4 : batch <= 4 ? 2 : 1; }
  enum { kTileRows = 2, kTileInputs = 4, kExpandRows = 2, kExpandInputs = 4 };
  static INLINE int64_t place(int64_t c) { return c; }
  static INLINE Acc zero() { return Acc{vdupq_n_f32(0), vdupq_n_f32(0)}; }
  static INLINE Acc add(Acc a, Acc b) {
    return Acc{vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)};
  }
  static INLINE float reduce(Acc acc) { return vaddvq_f32(vaddq_f32(acc.low, acc.high)); }
  enum { kReduced = 1 };
  static INLINE void reduce_many(const Acc* accs, float* out) { *out = reduce(*accs); }
  typedef Acc Sums;
  static INLINE Sums load_sums(const float* p) { return Acc{vld1q_f32(p), vld1q_f32(p + 4)}; }
  static INLINE void store_sums(float* p, Sums sums) {
    vst1q_f32(p, sums.low);
    vst1q_f32(p + 4, sums.high);
  }
  static INLINE Sums axpy_floats(Sums sums, float32x4_t low, float32x4_t high, float x) {
    return Acc{vfmaq_n_f32(sums.low, low, x), vfmaq_n_f32(sums.high, high, x)};
  }
  static INLINE Acc fma_floats(Acc acc, float32x4_t low, float32x4_t high, const X* x) {
    return Acc{vfmaq_f32(acc.low, low, vld1q_f32(x)), vfmaq_f32(acc.high, high, vld1q_f32(x + 4))};
  }
};

struct HalfWords : FloatAccumulator {
  typedef uint16_t Elem;
  typedef uint16x8_t W;
  static INLINE W spread(uint32_t mask, uint16x8_t values) {
    const uint8x16_t lookup = vld1q_u8(kTables.words[mask]);
    return vreinterpretq_u16_u8(vqtbl1q_u8(vreinterpretq_u8_u16(values), lookup));
  }
  static INLINE W expand(uint32_t mask, const Elem* p) { return spread(mask, vld1q_u16(p)); }
  static INLINE W expand_exact(uint32_t mask, const Elem* p) {
    return spread(mask, load_exact(p, __builtin_popcount(mask)));
  }
  static INLINE W load(const Elem* p) { return vld1q_u16(p); }
  static INLINE W load_exact(const Elem* p, int64_t n) {
    Elem values[kCols] = {};
    for (int64_t i = 0; i < n; ++i) values[i] = p[i];
    return vld1q_u16(values);
  }
  static INLINE void store(W w, Elem* p) { vst1q_u16(p, w); }
};

struct BF16 : HalfWords {
  static INLINE Acc fma(Acc acc, W w, const X* x) {
    const float32x4_t low = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(w), 16));
    const float32x4_t high = vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(w), 16));
    return fma_floats(acc, low, high, x);
  }
  static INLINE Sums axpy(Sums sums, W w, float x) {
    const float32x4_t low = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(w), 16));
    const float32x4_t high = vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(w), 16));
    return axpy_floats(sums, low, high, x);
  }
  static INLINE float to_float(Elem value) { return bf16_to_float(value); }
  static INLINE Elem from_float(float value) { return float_to_bf16(value); }
};

struct F16 : HalfWords {
  static INLINE Acc fma(Acc acc, W w, const X* x) {
    const float16x8_t half = vreinterpretq_f16_u16(w);
    return fma_floats(acc, vcvt_f32_f16(vget_low_f16(half)), vcvt_high_f32_f16(half), x);
  }
  static INLINE Sums axpy(Sums sums, W w, float x) {
    const float16x8_t half = vreinterpretq_f16_u16(w);
    return axpy_floats(sums, vcvt_f32_f16(vget_low_f16(half)), vcvt_high_f32_f16(half), x);
  }
  static INLINE float to_float(Elem value) { return f16_to_float(value); }
  static INLINE Elem from_float(float value) { return float_to_f16(value); }
};

struct F32 : FloatAccumulator {
  typedef float Elem;
  struct W {
    float32x4_t low, high;
  };
  static INLINE float32x4_t spread(uint32_t bits, const Elem* p) {
    const uint8x16_t lookup = vld1q_u8(kTables.lanes[bits]);
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(vld1q_f32(p)), lookup));
  }
  static INLINE W expand(uint32_t mask, const Elem* p) {
    const Elem* second = p + __builtin_popcount(mask & 15);
    return W{spread(mask & 15, p), spread(mask >> 4, second)};
  }
  static INLINE W expand_exact(uint32_t mask, const Elem* p) {
    Elem values[kCols + 4] = {};
    for (int i = 0; i < __builtin_popcount(mask); ++i) values[i] = p[i];
    return expand(mask, values);
  }
  static INLINE W load(const Elem* p) { return W{vld1q_f32(p), vld1q_f32(p + 4)}; }
  static INLINE W load_exact(const Elem* p, int64_t n) {
    Elem values[kCols] = {};
    for (int64_t i = 0; i < n; ++i) values[i] = p[i];
    return load(values);
  }
  static INLINE Acc fma(Acc acc, W w, const X* x) { return fma_floats(acc, w.low, w.high, x); }
  static INLINE Sums axpy(Sums sums, W w, float x) { return axpy_floats(sums, w.low, w.high, x); }
  static INLINE void store(W w, Elem* p) {
    vst1q_f32(p, w.low);
    vst1q_f32(p + 4, w.high);
  }
  static INLINE float to_float(Elem value) { return value; }
  static INLINE Elem from_float(float value) { return value; }
};

constexpr Isa kTable = {
    "neon",
    {linear_kernel<BF16>(), linear_kernel<F16>(), linear_kernel<F32>()},
    {decode_kernel<DecodeBF16<4>>(),
     decode_kernel<Scalars<uint16_t, f16_to_float, float_to_f16, 4>>(),
     decode_kernel<DecodeF32<4>>()},
    {channel_kernel<BF16>(), channel_kernel<F16>(), channel_kernel<F32>()},
};

}  // namespace

extern "C" const Isa* isa_neon(void) { return &kTable; }
