// Weights in input-channel-major order, for inputs of which most are skipped: a runtime layout, made
// from the stored form at load. C interface, as kernels.h.
//
// The outputs are cut into tiles. A chunk holds what one input channel contributes to one tile, in
// words of kWord outputs. A skipped channel costs nothing.
//
// Kernels read a chunk from both ends towards its middle. So the first half of its words, and the
// middle one, have 8 bytes of mask and then the kept values; the others the kept values and then the
// mask.
#pragma once

#include <stdint.h>

enum {
  kWord = 64,         // outputs of a word
  kGroup = 8,         // channels added in one pass over the sums; lists are padded to a multiple
  kMaxTile = 8192,    // outputs: their float sums stay in the first cache
  kListSlack = 32,    // entries that writing a list may touch behind its end
};

// chunks  starts[t * I + i] elements into `data` begins the chunk of input i for tile t
// dense   starts == nullptr: data is [I, pitch], zeros behind O; pitch is a multiple of kWord
// Wide loads reach up to kWord elements behind the last chunk: `data` must be that much longer.
struct ChannelWeight {
  const void* data;
  const uint32_t* starts;  // [tiles * I + 1]; the last is the end
  int64_t out_features, in_features;
  int64_t tile;  // a multiple of kWord, at most kMaxTile
  int64_t pitch;
};

static inline int64_t tile_count(const ChannelWeight* w) {
  return (w->out_features + w->tile - 1) / w->tile;
}

// Outputs of a tile, rounded up to whole words.
static inline int64_t tile_width(const ChannelWeight* w, int64_t tile) {
  const int64_t left = w->out_features - tile * w->tile;
  const int64_t width = left < w->tile ? left : w->tile;
  return (width + kWord - 1) / kWord * kWord;
}

// Which inputs of x [batch, I] count: x[m][i] does where |x[m][i]| * scales[i] > thresholds[m], in
// float32. A negative threshold: every input; infinity: none, the row is left out.
struct SelectArgs {
  const void* x;
  const float* scales;  // [I]; nullptr: ones
  const float* thresholds;
  int64_t in_features, batch;
};

// Channels that any row counts, rising, and the inputs of each row in pairs of two channels:
// values[(n / 2 * batch + m) * 2 + n % 2], zero where row m does not count the channel. Padded to a
// multiple of kGroup by the last channel again, with zeros.
struct ChannelList {
  int32_t* channels;
  void* values;
  int64_t count;   // with the padding
  int64_t active;  // without
};

// What part of a list adds to one tile: sums[m * pitch + o] = sum over entries [begin, end) of
// value * weight, for the outputs of the tile, whole words, in an order of the kernel's own.
struct ChannelSums {
  const ChannelWeight* weight;
  const ChannelList* list;
  int64_t batch, tile, begin, end;
  float* sums;
  int64_t pitch;
};

// y [batch, O] from the sums of all parts: sums + bias + addend; the latter may be nullptr, addend
// may be y. With `up` the result is silu(that) times the same of `up` and `up_bias`; no addend then.
struct ChannelFinish {
  const float* sums;  // [parts, batch, pitch]
  const float* up;
  int64_t parts, batch, pitch, out_features;
  const void* bias;
  const void* up_bias;
  void* y;
  const void* addend;
};

struct ChannelKernel {
  int64_t x_bytes;  // of one entry of ChannelList::values
  // One row: the whole list.
  void (*select)(const SelectArgs* args, ChannelList* list);
  // Several rows: marks [I] the channels any row counts, then the list's channels ...
  void (*select_union)(const SelectArgs* args, uint8_t* marks, ChannelList* list);
  // ... then the values of row m; returns how many inputs the row counts.
  int64_t (*gather)(const SelectArgs* args, const ChannelList* list, int64_t m);
  void (*sum)(const ChannelSums* args);
  // Outputs [begin, end); begin starts a word.
  void (*finish)(const ChannelFinish* args, int64_t begin, int64_t end);
  // Outputs [begin, end) of one tile, whole words but at the end, to out [I, end - begin].
  void (*unpack)(const ChannelWeight* w, void* out, int64_t begin, int64_t end);
};
