// What the operations of a plan have in common. Private to the plan's translation units.
#pragma once

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "plan.h"

struct FreeAligned {
  void operator()(void* memory) const { std::free(memory); }
};
using AlignedMemory = std::unique_ptr<void, FreeAligned>;

inline AlignedMemory allocate_aligned(int64_t bytes) {
  void* memory = std::aligned_alloc(64, static_cast<size_t>((bytes + 64) / 64 * 64));
  if (!memory) throw std::bad_alloc();
  return AlignedMemory(memory);
}

// Work is cut into `chunks()` pieces that the threads take in turn: one that the system interrupts
// leaves its pieces to the others.
struct Plan::Op {
  virtual ~Op() = default;
  // Before a run of other rows than the last: the first `rows` of the buffers, or all below 0.
  // Returns whether there is anything to do.
  virtual bool resize(int64_t rows) = 0;
  // Run by one thread when all that comes earlier is done, while the others wait: for what is too
  // short to share.
  virtual void before() {}
  virtual int64_t chunks(int parts) const = 0;
  virtual void run(int64_t chunk, int64_t chunks) = 0;
  std::atomic<int64_t> next{0};
};

// What a run of `rows` leaves of an operation's `batch` rows, from row `first` of the plan's on.
inline int64_t rows_of_run(int64_t rows, int64_t batch, int64_t first = 0) {
  if (rows < 0) return batch;
  return rows <= first ? 0 : rows - first < batch ? rows - first : batch;
}
