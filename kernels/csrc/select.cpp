#include "select.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "threads.h"

namespace {

// Bits whose order as integers is the order of the floats; -0 and +0 are equal.
uint32_t ordered(float score) {
  score += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &score, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

constexpr int kBucketBits = 11, kShift = 32 - kBucketBits, kBuckets = 1 << kBucketBits;

// Buckets by the leading bits find the one that holds the border; only its scores are ranked.
class Selector {
 public:
  explicit Selector(int64_t width) : keys_(static_cast<size_t>(width)), few_(keys_.size()) {}

  void mark(const float* scores, int64_t width, int64_t count, uint8_t* marked) {
    if (count == 0 || count == width) {
      std::memset(marked, count != 0, static_cast<size_t>(width));
      return;
    }
    std::memset(sizes_, 0, sizeof sizes_);
    for (int64_t i = 0; i < width; ++i) {
      const uint32_t key = keys_[static_cast<size_t>(i)] = ordered(scores[i]);
      ++sizes_[key >> kShift];
    }
    uint32_t bucket = 0;
    int64_t before = 0;  // scores in lower buckets
    while (before + sizes_[bucket] < count) before += sizes_[bucket++];
    size_t found = 0;
    for (int64_t i = 0; i < width; ++i) {
      few_[found] = keys_[static_cast<size_t>(i)];
      found += keys_[static_cast<size_t>(i)] >> kShift == bucket;
    }
    const auto nth = few_.begin() + (count - before - 1);
    std::nth_element(few_.begin(), nth, few_.begin() + static_cast<int64_t>(found));
    const uint32_t border = *nth;
    int64_t lower = before;
    for (size_t i = 0; i < found; ++i) lower += few_[i] < border;
    int64_t equals = count - lower;  // how many of the scores at the border are marked
    for (int64_t i = 0; i < width; ++i) {
      const uint32_t key = keys_[static_cast<size_t>(i)];
      const bool tie = key == border && equals > 0;
      equals -= tie;
      marked[i] = key < border || tie;
    }
  }

 private:
  std::vector<uint32_t> keys_, few_;
  int64_t sizes_[kBuckets];
};

struct SelectRun {
  const float* scores;
  int64_t rows, width;
  const int64_t* counts;
  uint8_t* marked;
  std::vector<Selector> selectors;  // one a thread
  std::atomic<int64_t> next{0};
};

void select_part(void* context, int part, int) {
  SelectRun& run = *static_cast<SelectRun*>(context);
  Selector& selector = run.selectors[static_cast<size_t>(part)];
  constexpr int64_t kRows = 16;
  for (int64_t i = run.next++; i * kRows < run.rows; i = run.next++)
    for (int64_t r = i * kRows; r < std::min(run.rows, (i + 1) * kRows); ++r)
      selector.mark(run.scores + r * run.width, run.width, run.counts[r],
                    run.marked + r * run.width);
}

}  // namespace

void run_mark_lowest(int threads, const float* scores, int64_t rows, int64_t width,
                     const int64_t* counts, uint8_t* marked) {
  SelectRun run{scores, rows, width, counts, marked,
                std::vector<Selector>(static_cast<size_t>(std::max(threads, 1)), Selector(width))};
  run_parallel(threads, select_part, &run);
}
