// The loops of channels.h, written once and compiled for every instruction set. Internal linkage,
// nothing from the C++ library: see rows.h.
//
// Beside what rows.h asks of a policy P, these need
//   axpy(float* sums, w, x)        sums += w * x over kCols outputs, where nothing better is given
// and Columns<P>, Word<P, ...> and Fetch<P> may be specialised.
//
// The sum of an output is float32 and runs through a part of the list in order, whatever tile, thread
// and other rows there are: a row's result depends on its own list only.
#pragma once

#include "channel_fetch.h"
#include "channels.h"
#include "decode_loops.h"

namespace {

// How pairs of channels are added: sums of kCols outputs in registers, in the policy's own order.
//   Sums, load_sums, store_sums;  Mix, mix(a, b): two channels' weights made ready;
//   fma(sums, mix, x)  adds both, x: their two inputs;  ordered(sums, out): in output order
template <class P> struct Columns {
  typedef typename P::Sums Sums;
  struct Mix {
    typename P::W a, b;
  };
  static INLINE Mix mix(const typename P::W& a, const typename P::W& b) { return Mix{a, b}; }
  static INLINE Sums fma(Sums sums, const Mix& mix, const typename P::X* x) {
    return P::axpy(P::axpy(sums, mix.a, (float)x[0]), mix.b, (float)x[1]);
  }
  static INLINE void ordered(const float* sums, float* out) {
    for (int c = 0; c < P::kCols; ++c) out[c] = sums[c];
  }
};

// Channels summed before their sums are added up: a running sum of thousands loses digits.
template <class Elem> constexpr int64_t sum_channels_of() { return sizeof(Elem) == 4 ? 32 : 512; }

// Weights of kCols outputs of one channel, from bit c of its word on; moves *at behind them.
template <class P, bool Packed>
INLINE typename P::W next_columns(uint64_t mask, int c, const char** at) {
  typedef typename P::Elem Elem;
  const Elem* value = (const Elem*)*at;
  if (!Packed) {
    *at += sizeof(Elem) * P::kCols;
    return P::load(value);
  }
  const auto bits = (typename MaskWord<P::kCols>::type)(mask >> c);
  *at = (const char*)(value + __builtin_popcountll(bits));
  return P::expand(bits, value);
}

// The next word of a chunk from one of its ends: its mask and its values. Moves *at behind them.
struct Place {
  const char *mask, *values;
};

template <class P, bool Packed, Side side> INLINE Place next_word(const char** at) {
  constexpr int64_t bytes = sizeof(typename P::Elem);
  const char* mask = side == kFront || !Packed ? *at : *at - kMaskBytes;
  const int64_t size =
      bytes * (Packed ? __builtin_popcountll(load_word<uint64_t>((const uint8_t*)mask)) : kWord);
  const char* values = side == kBack ? mask - size : Packed ? mask + kMaskBytes : mask;
  *at = side == kBack ? values : values + size;
  return Place{mask, values};
}

// One word of kWord outputs of a group of channels, added to the sums of B rows: those at the `side`
// of their chunks. Beside it the bytes that are due are fetched. May be specialised.
template <class P, bool Packed, int B> struct Word {
  template <Side side>
  static void add(const char** at, const char* const* ahead, Due due, const typename P::X* x,
                  float* sums, int64_t pitch);
};

template <class P, bool Packed, int B>
template <Side side>
INLINE void Word<P, Packed, B>::add(const char** at, const char* const* ahead, Due due,
                                    const typename P::X* x, float* sums, int64_t pitch) {
  typedef Columns<P> C;
  fetch<P, side>(at, ahead, due);
  uint64_t mask[kGroup];
  const char* values[kGroup];
  UNROLL for (int k = 0; k < kGroup; ++k) {
    const Place place = next_word<P, Packed, side>(&at[k]);
    values[k] = place.values;
    if (Packed) mask[k] = load_word<uint64_t>((const uint8_t*)place.mask);
  }
  UNROLL for (int c = 0; c < kWord; c += P::kCols) {
    typename C::Mix mix[kGroup / 2];
    UNROLL for (int k = 0; k < kGroup; k += 2) {
      const auto first = next_columns<P, Packed>(mask[k], c, &values[k]);
      mix[k / 2] = C::mix(first, next_columns<P, Packed>(mask[k + 1], c, &values[k + 1]));
    }
    UNROLL for (int b = 0; b < B; ++b) {
      float* place = sums + b * pitch + c;
      typename C::Sums sum = P::load_sums(place);
      UNROLL for (int p = 0; p < kGroup / 2; ++p) sum = C::fma(sum, mix[p], x + (p * B + b) * 2);
      P::store_sums(place, sum);
    }
  }
}

// Moves sums to where they are collected, and clears them.
INLINE void add_sums(float* sums, int64_t width, bool written, float* total) {
  if (written) {
    for (int64_t i = 0; i < width; ++i) total[i] += sums[i];
  } else {
    for (int64_t i = 0; i < width; ++i) total[i] = sums[i];
  }
  for (int64_t i = 0; i < width; ++i) sums[i] = 0;
}

// sums [B] of the tile's width = the listed channels times their inputs.
//
// Chunks are read from both ends towards the middle: processors fetch on behind what is read in
// order, a kilobyte and more on Zen 5, and what lies behind a chunk is mostly skipped. So they fetch
// the other half of the chunk (measured, eval/reports/LOG.md).
template <class P, bool Packed, int B> void sum_channels(const ChannelSums* a) {
  const ChannelWeight* w = a->weight;
  const ChannelList* list = a->list;
  const int64_t width = tile_width(w, a->tile), words = width / kWord, steps = (words + 1) / 2;
  alignas(64) float sums[B * kMaxTile];
  for (int64_t i = 0; i < B * width; ++i) sums[i] = 0;
  bool written = false;
  const int64_t first = a->tile * w->in_features, I = w->in_features;
  const int64_t elements = Packed ? (w->starts[first + I] - w->starts[first]) / I : width;
  const int64_t bytes = elements * (int64_t)sizeof(typename P::Elem) / words + 1;
  if (a->begin < a->end) {
    Ahead<P> ahead(a, width, steps, bytes);
    const typename P::X* x = (const typename P::X*)list->values + a->begin * B;
    for (int64_t n = a->begin; n < a->end; n += kGroup, x += kGroup * B) {
      Ends s;
      find_ends<P>(w, list, a->tile, width, n, &s);
      for (int64_t front = 0, back = words - 1; front <= back; ++front, --back, ahead.advance()) {
        const Due due = ahead.due();
        typedef Word<P, Packed, B> W;
        W::template add<kFront>(s.at[kFront], ahead.ends.at[kFront], due, x, sums + front * kWord,
                                width);
        if (front < back)
          W::template add<kBack>(s.at[kBack], ahead.ends.at[kBack], due, x, sums + back * kWord,
                                 width);
      }
      const bool pause = (n + kGroup - a->begin) % sum_channels_of<typename P::Elem>() == 0;
      if (!pause && n + kGroup < a->end) continue;
      for (int64_t m = 0; m < B; ++m)
        add_sums(sums + m * width, width, written, a->sums + m * a->pitch);
      written = true;
    }
  }
  for (int64_t m = 0; m < B && !written; ++m)
    add_sums(sums + m * width, width, false, a->sums + m * a->pitch);
}

template <class P, int B> INLINE void sum_tile(const ChannelSums* a) {
  if (a->weight->starts) return sum_channels<P, true, B>(a);
  sum_channels<P, false, B>(a);
}

template <class P> void sum_list(const ChannelSums* a) {
  switch (a->batch) {
    case 1: return sum_tile<P, 1>(a);
    case 2: return sum_tile<P, 2>(a);
    case 3: return sum_tile<P, 3>(a);
    case 4: return sum_tile<P, 4>(a);
    case 5: return sum_tile<P, 5>(a);
    case 6: return sum_tile<P, 6>(a);
    case 7: return sum_tile<P, 7>(a);
    default: return sum_tile<P, 8>(a);
  }
}

// The parts' sums of a word in output order, with the bias.
template <class P>
INLINE void finish_word(const ChannelFinish* a, const float* sums, const void* bias, int64_t m,
                        int64_t o, int64_t count, float* out) {
  float added[kWord];
  const float* part = sums + m * a->pitch + o;
  for (int64_t c = 0; c < kWord; ++c) added[c] = part[c];
  for (int64_t p = 1; p < a->parts; ++p) {
    part += a->batch * a->pitch;
    for (int64_t c = 0; c < kWord; ++c) added[c] += part[c];
  }
  UNROLL for (int c = 0; c < kWord; c += P::kCols) Columns<P>::ordered(added + c, out + c);
  if (!bias) return;
  const typename P::Elem* shift = (const typename P::Elem*)bias + o;
  for (int64_t c = 0; c < count; ++c) out[c] += P::to_float(shift[c]);
}

template <class P> void finish(const ChannelFinish* a, int64_t begin, int64_t end) {
  typedef typename P::Elem Elem;
  for (int64_t m = 0; m < a->batch; ++m) {
    for (int64_t o = begin; o < end; o += kWord) {
      float out[kWord], other[kWord];
      const int64_t count = end - o < kWord ? end - o : (int64_t)kWord, at = m * a->out_features + o;
      finish_word<P>(a, a->sums, a->bias, m, o, count, out);
      if (a->up) {
        finish_word<P>(a, a->up, a->up_bias, m, o, count, other);
#pragma omp simd
        for (int64_t c = 0; c < count; ++c) {
          // gate and up are rounded as they would be if they were stored
          const float gate = P::to_float(P::from_float(out[c]));
          out[c] = gate / (1.0f + exp_of(-gate)) * P::to_float(P::from_float(other[c]));
        }
      } else if (a->addend) {
        const Elem* addend = (const Elem*)a->addend + at;
        for (int64_t c = 0; c < count; ++c) out[c] += P::to_float(addend[c]);
      }
      Elem* y = (Elem*)a->y + at;
#pragma omp simd
      for (int64_t c = 0; c < count; ++c) y[c] = P::from_float(out[c]);
    }
  }
}

// -- which channels count --------------------------------------------------------------------------

INLINE bool counts(float x, float scale, float threshold) {
  // a NaN counts: it must show in the result
  return !(__builtin_fabsf(x) * scale <= threshold);
}

INLINE float scale_of(const SelectArgs* a, int64_t i) { return a->scales ? a->scales[i] : 1.0f; }

INLINE void pad_list(ChannelList* list) {
  const int64_t padded = (list->active + kGroup - 1) / kGroup * kGroup;
  const int32_t last = list->active ? list->channels[list->active - 1] : 0;
  for (int64_t n = list->active; n < padded; ++n) list->channels[n] = last;
  list->count = padded;
}

// One row, written without branches: entries behind the end are written again.
template <class P> struct Select {
  static void run(const SelectArgs* a, ChannelList* list) {
    const typename P::Elem* x = (const typename P::Elem*)a->x;
    typename P::X* values = (typename P::X*)list->values;
    const float threshold = a->thresholds[0];
    int64_t n = 0;
    for (int64_t i = 0; i < a->in_features; ++i) {
      const float value = P::to_float(x[i]);
      list->channels[n] = (int32_t)i;
      if constexpr (Same<typename P::X, typename P::Elem>::value) values[n] = x[i];
      else values[n] = value;
      n += counts(value, scale_of(a, i), threshold);
    }
    list->active = n;
  }
};

template <class P> void select_channels(const SelectArgs* a, ChannelList* list) {
  list->active = 0;
  if (a->thresholds[0] < __builtin_inff()) Select<P>::run(a, list);
  pad_list(list);
  typename P::X* values = (typename P::X*)list->values;
  for (int64_t n = list->active; n < list->count; ++n) values[n] = 0;
}

template <class P>
void select_union(const SelectArgs* a, uint8_t* marks, ChannelList* list) {
  const int64_t I = a->in_features;
  for (int64_t i = 0; i < I; ++i) marks[i] = 0;
  for (int64_t m = 0; m < a->batch; ++m) {
    const typename P::Elem* x = (const typename P::Elem*)a->x + m * I;
    const float threshold = a->thresholds[m];
    if (!(threshold < __builtin_inff())) continue;
#pragma omp simd
    for (int64_t i = 0; i < I; ++i)
      marks[i] |= counts(P::to_float(x[i]), scale_of(a, i), threshold);
  }
  int64_t n = 0;
  for (int64_t i = 0; i < I; ++i) {
    list->channels[n] = (int32_t)i;
    n += marks[i];
  }
  list->active = n;
  pad_list(list);
}

template <class P> int64_t gather(const SelectArgs* a, const ChannelList* list, int64_t m) {
  typedef typename P::X X;
  const typename P::Elem* x = (const typename P::Elem*)a->x + m * a->in_features;
  X* values = (X*)list->values + 2 * m;
  const float threshold = a->thresholds[m];
  const bool live = threshold < __builtin_inff();
  int64_t active = 0;
  for (int64_t n = 0; n < list->count; ++n) {
    const int32_t i = list->channels[n];
    const float value = P::to_float(x[i]);
    const bool kept =
        live && n < list->active && counts(value, scale_of(a, i), threshold);
    X entry;
    if constexpr (Same<X, typename P::Elem>::value) entry = x[i];
    else entry = value;
    values[n / 2 * 2 * a->batch + n % 2] = kept ? entry : (X)0;
    active += kept;
  }
  return active;
}

// -- the dense weight ------------------------------------------------------------------------------

// The weights of a word, `count` of them, to y.
template <class P> INLINE void unpack_word(const Place& place, typename P::Elem* y, int64_t count) {
  typedef typename P::Elem Elem;
  const uint64_t mask = load_word<uint64_t>((const uint8_t*)place.mask);
  const Elem* values = (const Elem*)place.values;
  Elem tail[kWord];
  Elem* to = count < kWord ? tail : y;
  UNROLL for (int c = 0; c < kWord; c += P::kCols) {
    const auto bits = (typename MaskWord<P::kCols>::type)(mask >> c);
    P::store(P::expand(bits, values), to + c);
    values += __builtin_popcountll(bits);
  }
  for (int64_t c = 0; to == tail && c < count; ++c) y[c] = tail[c];
}

template <class P> void unpack_channels(const ChannelWeight* w, void* out, int64_t begin, int64_t end) {
  typedef typename P::Elem Elem;
  const int64_t tile = begin / w->tile, width = end - begin;
  const int64_t words = tile_width(w, tile) / kWord, fronts = (words + 1) / 2;
  const int64_t first = (begin - tile * w->tile) / kWord, last = first + (width + kWord - 1) / kWord;
  for (int64_t i = 0; i < w->in_features; ++i) {
    const char *front = chunk_at<P>(w, tile, i), *back = chunk_at<P>(w, tile, i + 1);
    Elem* y = (Elem*)out + i * width;
    const auto put = [&](const Place& place, int64_t word) {
      const int64_t o = (word - first) * kWord;
      if (o >= 0 && word < last) unpack_word<P>(place, y + o, width - o);
    };
    for (int64_t word = 0; word < fronts && word < last; ++word)
      put(next_word<P, true, kFront>(&front), word);
    for (int64_t word = words - 1; word >= fronts && word >= first; --word)
      put(next_word<P, true, kBack>(&back), word);
  }
}

template <class P> constexpr ChannelKernel channel_kernel() {
  return ChannelKernel{sizeof(typename P::X), select_channels<P>, select_union<P>,
                       gather<P>,             sum_list<P>,        finish<P>,
                       unpack_channels<P>};
}

}  // namespace
