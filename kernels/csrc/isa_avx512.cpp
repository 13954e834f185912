// AVX-512 F, BW, VL, DQ without VBMI2 and BF16: 16-bit values are widened, then expanded.
#include "avx512.h"
#include "tokens.h"

namespace {

constexpr Isa kTable = {
    "avx512",
    {linear_kernel<FloatPairs<BF16Lanes>>(), linear_kernel<FloatPairs<F16Lanes>>(),
     linear_kernel<FloatPairs<F32Lanes>>()},
    {decode_kernel<DecodeBF16<8>>(),
     decode_kernel<Scalars<uint16_t, f16_to_float, float_to_f16, 8>>(),
     decode_kernel<DecodeF32<8>>()},
    {channel_kernel<FloatPairs<BF16Lanes>>(), channel_kernel<FloatPairs<F16Lanes>>(),
     channel_kernel<FloatPairs<F32Lanes>>()},
    nullptr,
    &attention_avx512,
};

}  // namespace

extern "C" const Isa* isa_avx512(void) { return &kTable; }
