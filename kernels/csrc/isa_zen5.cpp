// The channels of avx512bf16 as memory answers Zen 5.
#include "avx512bf16.h"

namespace {

// To the first cache at once: a request of the second for these runs takes twice the time (measured);
// from the first they fall to the second. Ahead by a part of the first cache.
template <> struct Fetch<BF16> {
  enum { kEveryLine = false, kAhead = 8192 };
  static INLINE void ahead(const char* at) { __builtin_prefetch(at, 0, 3); }
  template <Side side> static INLINE void near(const char*) {}
};

constexpr ChannelKernel kKernel = channel_kernel<BF16>();

}  // namespace

extern "C" const ChannelKernel* channels_zen5(void) { return &kKernel; }
