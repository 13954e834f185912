// What the extension offers, without Python: choosing an instruction set, checking the content of
// a packed weight, and multiplying with it on several threads.
#pragma once

#include <stdint.h>

#include "kernels.h"

// Whether the machine has dot products of bf16 pairs that take longer than the multiply-adds they stand
// for.
bool has_slow_pairs();

// The instruction sets that this machine can run, fastest first; returns how many.
enum { kMaxIsas = 6 };
int supported_isas(const Isa* found[kMaxIsas]);

enum class Fault {
  none,
  offsets_start,      // offsets[0] is not 0
  offsets_order,      // offsets[row + 1] is smaller than offsets[row], or larger than nnz
  offsets_end,        // offsets[O] is not nnz
  row_count,          // the bitmask of a row does not keep as many columns as the row has values
  padding,            // a bit behind the last column is set
};

struct Check {
  Fault fault;
  int64_t row;
  int64_t expected;
  int64_t found;
};

// Reads every offset and every mask byte; reads no value.
Check check_weight(const Weight& weight);

// y [M, O] = x [M, I] times the weight, which must have passed check_weight (or be dense).
void run_linear(const Isa& isa, DType dtype, int threads, const Weight& weight, const void* x,
                int64_t batch, const void* bias, void* y);

// Rows [begin, end) of a packed weight, dense.
void run_unpack(const Isa& isa, DType dtype, int threads, const Weight& weight, void* out,
                int64_t begin, int64_t end);

// The sum of all 64-bit words of a buffer, read once from start to end by each thread's share: the
// read bandwidth that benchmarks compare with.
uint64_t read_all(const void* data, int64_t bytes, int threads);

// Asks the system to move the whole huge pages inside a buffer to huge pages, now; content and
// address stay. Where it cannot (file mappings, no such system), nothing happens.
void use_huge_pages(const void* data, int64_t bytes);
