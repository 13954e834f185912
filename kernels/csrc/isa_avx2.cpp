// AVX2, FMA and F16C. There is no expand instruction: a table turns 8 mask bits into a shuffle.
#include <immintrin.h>

#include "channel_loops.h"
#include "tokens.h"

namespace {

INLINE float f16_to_float(uint16_t bits) { return _cvtsh_ss(bits); }
INLINE uint16_t float_to_f16(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }

// For the 8 bits m of a mask, with 0x80 to write a zero:
// floats[m]  byte shuffle that spreads bf16 values to the upper halves of 32-bit lanes: as floats
// halves[m]  byte shuffle that spreads 16-bit values
// lanes[m]   source of each 32-bit lane, for vpermd; lanes of clear bits are zeroed apart
struct Tables {
  alignas(64) uint8_t floats[256][32];
  alignas(64) uint8_t halves[256][16];
  alignas(64) uint8_t lanes[256][8];
};

constexpr Tables make_tables() {
  Tables tables = {};
  for (int mask = 0; mask < 256; ++mask) {
    int source = 0;
    for (int bit = 0; bit < 8; ++bit) {
      const bool kept = mask >> bit & 1;
      for (int byte = 0; byte < 4; ++byte) tables.floats[mask][4 * bit + byte] = 0x80;
      for (int byte = 0; byte < 2; ++byte) {
        const uint8_t from = kept ? (uint8_t)(2 * source + byte) : 0x80;
        tables.floats[mask][4 * bit + 2 + byte] = from;
        tables.halves[mask][2 * bit + byte] = from;
      }
      tables.lanes[mask][bit] = (uint8_t)source;
      source += kept;
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

struct FloatAccumulator {
  typedef __m256 Acc;
  static constexpr int kRows(int batch, bool) { return batch == 1 ? 4 : batch == 2 ? 3 : 2; }
  enum { kTileRows = 2, kTileInputs = 4, kExpandRows = 2, kExpandInputs = 4 };
  static INLINE int64_t place(int64_t c) { return c; }
  static INLINE Acc zero() { return _mm256_setzero_ps(); }
  static INLINE Acc add(Acc a, Acc b) { return _mm256_add_ps(a, b); }
  static INLINE float reduce(Acc acc) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(acc), _mm256_extractf128_ps(acc, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }
  enum { kReduced = 1 };
  static INLINE void reduce_many(const Acc* accs, float* out) { *out = reduce(*accs); }
};

struct BF16Lanes {
  static INLINE __m256 spread(uint64_t mask, const uint16_t* p) {
    // the shuffle stays inside 128 bits: both halves get the same 8 values
    const __m256i values = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
    const __m256i order = _mm256_load_si256((const __m256i*)kTables.floats[mask]);
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(values, order));
  }
  static INLINE __m256 load(const uint16_t* p) {
    const __m128i values = _mm_loadu_si128((const __m128i*)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(values), 16));
  }
  static INLINE void store(__m256 w, uint16_t* p) {
    const __m256i upper = _mm256_srli_epi32(_mm256_castps_si256(w), 16);
    const __m256i packed = _mm256_packus_epi32(upper, _mm256_setzero_si256());
    const __m256i joined = _mm256_permute4x64_epi64(packed, 0x08);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(joined));
  }
  static INLINE float to_float(uint16_t value) { return bf16_to_float(value); }
  static INLINE uint16_t from_float(float value) { return float_to_bf16(value); }
};

struct F16Lanes {
  static INLINE __m256 spread(uint64_t mask, const uint16_t* p) {
    const __m128i order = _mm_load_si128((const __m128i*)kTables.halves[mask]);
    return _mm256_cvtph_ps(_mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)p), order));
  }
  static INLINE __m256 load(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  }
  static INLINE void store(__m256 w, uint16_t* p) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(w, _MM_FROUND_TO_NEAREST_INT));
  }
  static INLINE float to_float(uint16_t value) { return f16_to_float(value); }
  static INLINE uint16_t from_float(float value) { return float_to_f16(value); }
};

// 16 kept 16-bit values as two registers of floats.
template <class Lanes> struct HalfWords : FloatAccumulator {
  typedef uint16_t Elem;
  typedef float X;
  struct W {
    __m256 low, high;
  };
  enum { kCols = 16 };
  static INLINE W expand(uint32_t mask, const Elem* p) {
    const Elem* second = p + __builtin_popcount(mask & 0xff);
    return W{Lanes::spread(mask & 0xff, p), Lanes::spread(mask >> 8, second)};
  }
  static INLINE W expand_exact(uint32_t mask, const Elem* p) {
    Elem values[kCols] = {};
    for (int i = 0; i < __builtin_popcount(mask); ++i) values[i] = p[i];
    return expand(mask, values);
  }
  static INLINE W load(const Elem* p) { return W{Lanes::load(p), Lanes::load(p + 8)}; }
  static INLINE W load_exact(const Elem* p, int64_t n) {
    Elem values[kCols] = {};
    for (int64_t i = 0; i < n; ++i) values[i] = p[i];
    return load(values);
  }
  static INLINE Acc fma(Acc acc, W w, const X* x) {
    acc = _mm256_fmadd_ps(w.low, _mm256_loadu_ps(x), acc);
    return _mm256_fmadd_ps(w.high, _mm256_loadu_ps(x + 8), acc);
  }
  typedef W Sums;
  static INLINE Sums load_sums(const float* p) {
    return W{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
  }
  static INLINE void store_sums(float* p, Sums sums) {
    _mm256_storeu_ps(p, sums.low);
    _mm256_storeu_ps(p + 8, sums.high);
  }
  static INLINE Sums axpy(Sums sums, W w, float x) {
    const __m256 factor = _mm256_set1_ps(x);
    return W{_mm256_fmadd_ps(w.low, factor, sums.low), _mm256_fmadd_ps(w.high, factor, sums.high)};
  }
  static INLINE void store(W w, Elem* p) {
    Lanes::store(w.low, p);
    Lanes::store(w.high, p + 8);
  }
  static INLINE float to_float(Elem value) { return Lanes::to_float(value); }
  static INLINE Elem from_float(float value) { return Lanes::from_float(value); }
};

// One row: the sums of a whole word stay in registers while channel after channel is added.
template <class Lanes> struct Word<HalfWords<Lanes>, true, 1> {
  template <Side side>
  static INLINE void add(const char** at, const char* const* ahead, Due due, const float* x,
                         float* sums, int64_t) {
    enum { kParts = kWord / 8 };
    fetch<HalfWords<Lanes>, side>(at, ahead, due);
    __m256 sum[kParts];
    UNROLL for (int c = 0; c < kParts; ++c) sum[c] = _mm256_loadu_ps(sums + 8 * c);
    UNROLL for (int k = 0; k < kGroup; ++k) {
      const Place place = next_word<HalfWords<Lanes>, true, side>(&at[k]);
      const uint8_t* mask = (const uint8_t*)place.mask;
      const uint16_t* values = (const uint16_t*)place.values;
      const __m256 factor = _mm256_set1_ps(x[k]);
      UNROLL for (int c = 0; c < kParts; ++c) {
        const uint64_t bits = mask[c];
        sum[c] = _mm256_fmadd_ps(Lanes::spread(bits, values), factor, sum[c]);
        values += __builtin_popcountll(bits);
      }
    }
    UNROLL for (int c = 0; c < kParts; ++c) _mm256_storeu_ps(sums + 8 * c, sum[c]);
  }
};

struct F32 : FloatAccumulator {
  typedef float Elem;
  typedef float X;
  typedef __m256 W;
  enum { kCols = 8 };
  static INLINE __m256i first_lanes(int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), lane);
  }
  static INLINE W spread(uint32_t mask, __m256 values) {
    const __m128i packed = _mm_loadl_epi64((const __m128i*)kTables.lanes[mask]);
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i kept = _mm256_and_si256(_mm256_set1_epi32((int)mask), bit);
    const __m256 spread = _mm256_permutevar8x32_ps(values, _mm256_cvtepu8_epi32(packed));
    return _mm256_and_ps(spread, _mm256_castsi256_ps(_mm256_cmpeq_epi32(kept, bit)));
  }
  static INLINE W expand(uint32_t mask, const Elem* p) {
    return spread(mask, _mm256_loadu_ps(p));
  }
  static INLINE W expand_exact(uint32_t mask, const Elem* p) {
    return spread(mask, _mm256_maskload_ps(p, first_lanes(__builtin_popcount(mask))));
  }
  static INLINE W load(const Elem* p) { return _mm256_loadu_ps(p); }
  static INLINE W load_exact(const Elem* p, int64_t n) {
    return _mm256_maskload_ps(p, first_lanes(n));
  }
  static INLINE Acc fma(Acc acc, W w, const X* x) {
    return _mm256_fmadd_ps(w, _mm256_loadu_ps(x), acc);
  }
  typedef W Sums;
  static INLINE Sums load_sums(const float* p) { return _mm256_loadu_ps(p); }
  static INLINE void store_sums(float* p, Sums sums) { _mm256_storeu_ps(p, sums); }
  static INLINE Sums axpy(Sums sums, W w, float x) {
    return _mm256_fmadd_ps(w, _mm256_set1_ps(x), sums);
  }
  static INLINE void store(W w, Elem* p) { _mm256_storeu_ps(p, w); }
  static INLINE float to_float(Elem value) { return value; }
  static INLINE Elem from_float(float value) { return value; }
};

constexpr Isa kTable = {
    "avx2",
    {linear_kernel<HalfWords<BF16Lanes>>(), linear_kernel<HalfWords<F16Lanes>>(),
     linear_kernel<F32>()},
    {decode_kernel<DecodeBF16<4>>(),
     decode_kernel<Scalars<uint16_t, f16_to_float, float_to_f16, 4>>(),
     decode_kernel<DecodeF32<4>>()},
    {channel_kernel<HalfWords<BF16Lanes>>(), channel_kernel<HalfWords<F16Lanes>>(),
     channel_kernel<F32>()},
    nullptr,
    &attention_avx2,
};

}  // namespace

extern "C" const Isa* isa_avx2(void) { return &kTable; }
