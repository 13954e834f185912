// Exact selection by rank, row by row: the inner loop of a pruning mask.
#pragma once

#include <stdint.h>

// marked[r][w] = 1 for the counts[r] lowest of the `width` scores of row r, 0 elsewhere; of equal
// scores the leftmost are marked. Scores hold no NaN; 0 <= counts[r] <= width.
void run_mark_lowest(int threads, const float* scores, int64_t rows, int64_t width,
                     const int64_t* counts, uint8_t* marked);
