// AVX-512 with VBMI2 (expand of 16-bit lanes) and BF16 (dot product of bf16 pairs).
#include "avx512vbmi2.h"
#include "tokens.h"

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

template <> struct Select<BF16> {
  static void run(const SelectArgs* a, ChannelList* list) {
    uint16_t* values = (uint16_t*)list->values;
    select_lanes<BF16Lanes>(a, list,
                            [=](__m512 kept, int64_t n) { BF16Lanes::store(kept, values + n); });
  }
};

constexpr Isa kTable = avx512_table<BF16>("avx512bf16", &gram_avx512bf16, &attention_avx512bf16);

}  // namespace

extern "C" const Isa* isa_avx512bf16(void) { return &kTable; }
