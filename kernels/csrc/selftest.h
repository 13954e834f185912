// What the parts of the self test share.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

// Prints and counts a failure unless `holds`.
void expect(bool holds, const char* what, const Isa& isa, int dtype, int64_t rows, int64_t columns,
            int64_t batch);

size_t elem_bytes(DType dtype);
// |value| is 0 or between 2^-14 and 65504 and fits the dtype exactly.
void encode(DType dtype, float value, char* out);
float decode(DType dtype, const char* in);

void test_tokens_and_plans(const Isa& isa);
void test_channels(const Isa& isa);
