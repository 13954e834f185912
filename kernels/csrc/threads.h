// One parallel loop for the extension, on torch's own threads where they can be found.
#pragma once

#include <stdint.h>

// Calls body(context, part, parts) for part = 0 .. parts - 1, parts <= threads, and waits.
// An exception must not leave body.
void run_parallel(int threads, void (*body)(void* context, int part, int parts), void* context);

// "openmp": the OpenMP runtime that torch loaded, so that two libraries never own two sets of
// threads. "own": sleeping workers of our own, where no such runtime is loaded.
const char* thread_pool_name();
