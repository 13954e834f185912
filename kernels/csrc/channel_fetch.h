// Where the chunks of channels.h begin and end, and how memory is asked for them ahead of the words
// that are added. Internal linkage, nothing from the C++ library: see rows.h.
#pragma once

#include "channels.h"
#include "rows.h"

namespace {

constexpr int64_t kMaskBytes = kWord / 8, kNearBytes = 256, kLine = 64;

// The end of a chunk that a pass reads from; see channels.h.
enum Side { kFront, kBack };

// Places in the chunks of a group, one for each channel: where a pass stands, at both ends.
struct Ends {
  const char* at[2][kGroup];
};

// Bytes behind the ends of chunks that are fetched beside a word. (A struct of its own: its numbers
// then lie in registers.)
struct Due {
  int64_t from, until;
};

// How memory is asked for a chunk: an instruction set says which cache it should come to.
template <class P> struct Fetch {
  // Every line of a chunk is asked for. Else as many beside every word, the nearest number: cheaper,
  // where the processor fetches what is left out in the middle of a chunk on its own.
  // kAhead: how many bytes ahead of the words that are added, long enough for memory to answer.
  enum { kEveryLine = true, kAhead = 8192 };
  // To the second cache: on Intel's cores requests of the first are too few to hide memory's delay.
  static INLINE void ahead(const char* at) { __builtin_prefetch(at, 0, 2); }
  // And a little ahead to the first.
  template <Side side> static INLINE void near(const char* at) {
    __builtin_prefetch(side == kFront ? at + kNearBytes : at - kNearBytes, 0, 3);
  }
};

template <class P, Side side> INLINE void fetch_line(const char* end, int64_t offset) {
  Fetch<P>::ahead(side == kFront ? end + offset : end - 1 - offset);
}

// All that is due beside a word, at once.
template <class P, Side side>
INLINE void fetch(const char* const* at, const char* const* ahead, Due due) {
  // mostly one line: the loop is for more (measured: it costs a tenth)
  if (due.from < due.until) {
    UNROLL for (int k = 0; k < kGroup; ++k) fetch_line<P, side>(ahead[k], due.from);
    for (due.from += kLine; __builtin_expect(due.from < due.until, 0); due.from += kLine)
      UNROLL for (int k = 0; k < kGroup; ++k) fetch_line<P, side>(ahead[k], due.from);
  }
  UNROLL for (int k = 0; k < kGroup; ++k) Fetch<P>::template near<side>(at[k]);
}

template <class P> INLINE const char* chunk_at(const ChannelWeight* w, int64_t tile, int64_t i) {
  constexpr int64_t bytes = sizeof(typename P::Elem);
  const int64_t element =
      w->starts ? w->starts[tile * w->in_features + i] : i * w->pitch + tile * w->tile;
  return (const char*)w->data + element * bytes;
}

// Both ends of the chunks of the group at entry n of the list.
template <class P>
INLINE void find_ends(const ChannelWeight* w, const ChannelList* list, int64_t tile, int64_t width,
                      int64_t n, Ends* ends) {
  UNROLL for (int k = 0; k < kGroup; ++k) {
    const int32_t channel = list->channels[n + k];
    const char* front = chunk_at<P>(w, tile, channel);
    ends->at[kFront][k] = front;
    ends->at[kBack][k] = w->starts ? chunk_at<P>(w, tile, channel + 1)
                                   : front + width * (int64_t)sizeof(typename P::Elem);
  }
}

// Where a pass fetches: so many steps ahead of the words that it adds, in their order.
template <class P> struct Ahead {
  const ChannelSums* const a;
  const int64_t width, steps, bytes;  // outputs; steps through a chunk; bytes of a word, the mean
  const int64_t lines;  // of a word, where not every line is asked for
  int64_t n, step = 0;
  Ends ends;

  INLINE Ahead(const ChannelSums* a, int64_t width, int64_t steps, int64_t bytes)
      : a(a), width(width), steps(steps), bytes(bytes),
        lines((bytes + kLine / 2) / kLine > 1 ? (bytes + kLine / 2) / kLine : 1), n(a->begin) {
    open();
    // what the first words need, and enough lines for memory to answer before they are added
    const int64_t first = Fetch<P>::kAhead / (2 * kGroup * bytes) + 1;
    for (int64_t i = 0; i < first && n < a->end; ++i, advance()) {
      const Due now = due();
      for (int64_t at = now.from; at < now.until; at += kLine) {
        UNROLL for (int k = 0; k < kGroup; ++k) {
          fetch_line<P, kFront>(ends.at[kFront][k], at);
          fetch_line<P, kBack>(ends.at[kBack][k], at);
        }
      }
    }
  }
  INLINE void open() { find_ends<P>(a->weight, a->list, a->tile, width, n, &ends); }
  INLINE Due due() const {
    if (Fetch<P>::kEveryLine) {
      const int64_t from = (step * bytes + kLine - 1) / kLine * kLine;
      return Due{from, n < a->end ? (step + 1) * bytes : from};
    }
    const int64_t from = step * lines * kLine;
    return Due{from, n < a->end && from < steps * bytes ? from + lines * kLine : from};
  }
  INLINE void advance() {
    if (++step < steps) return;
    step = 0;
    if ((n += kGroup) < a->end) open();
  }
};

}  // namespace
