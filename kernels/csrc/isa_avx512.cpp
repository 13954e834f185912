// AVX-512 F, BW, VL, DQ without VBMI2 and BF16: 16-bit values are widened, then expanded.
#include "avx512.h"
#include "tokens.h"

namespace {

constexpr Isa kTable = avx512_table<FloatPairs<BF16Lanes>>("avx512", nullptr, &attention_avx512);

}  // namespace

extern "C" const Isa* isa_avx512(void) { return &kTable; }
