// AVX-512 with VBMI2 (expand of 16-bit lanes) and BF16 (dot product of bf16 pairs).
#include "avx512bf16.h"
#include "tokens.h"

namespace {

// To the second cache and no further: what Zen 4 is fastest with (measured).
template <> struct Fetch<BF16> {
  enum { kEveryLine = true, kAhead = 16384 };
  static INLINE void ahead(const char* at) { __builtin_prefetch(at, 0, 2); }
  template <Side side> static INLINE void near(const char*) {}
};

constexpr Isa kTable = avx512_table<BF16>("avx512bf16", &gram_avx512bf16, &attention_avx512bf16);

}  // namespace

extern "C" const Isa* isa_avx512bf16(void) { return &kTable; }
