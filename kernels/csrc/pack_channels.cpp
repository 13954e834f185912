#include "pack_channels.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "threads.h"

namespace {

// Channels handled together: their write positions stay in the cache.
constexpr int64_t kColumnBlock = 512;

struct PackCall {
  const Weight& weight;
  const ChannelWeight& channels;
  const int64_t elem_bytes;
  uint32_t* const counts;  // [tiles, I]
  char* const data;
  std::atomic<int64_t> next{0};
};

// Mask bits of the 64 inputs from `column` on.
uint64_t mask_word(const Weight& w, int64_t row, int64_t column) {
  const int64_t pitch = mask_pitch(&w), byte = column / 8;
  uint64_t word = 0;
  std::memcpy(&word, w.bitmask + row * pitch + byte,
              static_cast<size_t>(std::min<int64_t>(8, pitch - byte)));
  return word;
}

int64_t last_row(const PackCall& call, int64_t tile) {
  return std::min(call.weight.out_features, (tile + 1) * call.channels.tile);
}

void count_tile(PackCall& call, int64_t tile) {
  const Weight& w = call.weight;
  uint32_t* counts = call.counts + tile * w.in_features;
  for (int64_t row = tile * call.channels.tile; row < last_row(call, tile); ++row)
    for (int64_t column = 0; column < w.in_features; column += 64)
      for (uint64_t mask = mask_word(w, row, column); mask; mask &= mask - 1)
        ++counts[column + __builtin_ctzll(mask)];
}

// Rows become columns; the loops of Hacker's Delight (Warren, 7-3) for 64 bits.
void transpose_64(uint64_t rows[64]) {
  uint64_t mask = 0x00000000ffffffffull;
  for (int step = 32; step; step >>= 1, mask ^= mask << step) {
    for (int k = 0; k < 64; k = (k + step + 1) & ~step) {
      const uint64_t swap = ((rows[k] >> step) ^ rows[k + step]) & mask;
      rows[k] ^= swap << step;
      rows[k + step] ^= swap;
    }
  }
}

// One word of outputs, 64 channels, at the channels' positions: their masks, then their values, or
// the other way round.
template <class Elem>
void fill_word(const Weight& w, int64_t row, int64_t rows, int64_t column, bool masks_first,
               const Elem** values, char** at) {
  uint64_t masks[64] = {}, turned[64];
  for (int64_t r = 0; r < rows; ++r) masks[r] = mask_word(w, row + r, column);
  std::memcpy(turned, masks, sizeof turned);
  transpose_64(turned);
  const int64_t columns = std::min<int64_t>(64, w.in_features - column);
  const auto put_masks = [&] {
    for (int64_t c = 0; c < columns; ++c) {
      std::memcpy(at[c], &turned[c], sizeof turned[c]);
      at[c] += sizeof turned[c];
    }
  };
  if (masks_first) put_masks();
  for (int64_t r = 0; r < rows; ++r) {
    for (uint64_t mask = masks[r]; mask; mask &= mask - 1) {
      const int c = __builtin_ctzll(mask);
      std::memcpy(at[c], values[r]++, sizeof(Elem));
      at[c] += sizeof(Elem);
    }
  }
  if (!masks_first) put_masks();
}

template <class Elem> void fill_tile(PackCall& call, int64_t tile) {
  const Weight& w = call.weight;
  const int64_t first = tile * call.channels.tile, last = last_row(call, tile);
  std::vector<const Elem*> values;
  for (int64_t row = first; row < last; ++row)
    values.push_back(static_cast<const Elem*>(w.values) + row_start(&w, row));
  std::vector<char*> at(kColumnBlock);
  const uint32_t* starts = call.channels.starts + tile * w.in_features;
  for (int64_t block = 0; block < w.in_features; block += kColumnBlock) {
    const int64_t end = std::min(block + kColumnBlock, w.in_features);
    for (int64_t i = block; i < end; ++i)
      at[static_cast<size_t>(i - block)] = call.data + int64_t(starts[i]) * int64_t(sizeof(Elem));
    for (int64_t row = first; row < last; row += kWord) {
      const bool masks_first = 2 * (row - first) < last - first;
      for (int64_t column = block; column < end; column += 64)
        fill_word<Elem>(w, row, std::min<int64_t>(kWord, last - row), column, masks_first,
                        values.data() + (row - first), at.data() + (column - block));
    }
  }
}

void each_tile(PackCall& call, int threads, void (*function)(PackCall&, int64_t)) {
  struct Loop {
    PackCall& call;
    void (*function)(PackCall&, int64_t);
  } loop{call, function};
  const auto part = [](void* context, int, int) {
    Loop& loop = *static_cast<Loop*>(context);
    const int64_t tiles = tile_count(&loop.call.channels);
    for (int64_t tile; (tile = loop.call.next++) < tiles;) loop.function(loop.call, tile);
  };
  run_parallel(threads, part, &loop);
}

}  // namespace

int64_t measure_channels(const Weight& weight, int64_t tile, int64_t elem_bytes, int threads,
                         uint32_t* starts) {
  const ChannelWeight channels{nullptr, starts, weight.out_features, weight.in_features, tile, 0};
  const int64_t I = weight.in_features, tiles = tile_count(&channels);
  std::vector<uint32_t> counts(static_cast<size_t>(tiles * I));
  PackCall call{weight, channels, elem_bytes, counts.data(), nullptr};
  each_tile(call, threads, count_tile);
  int64_t at = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t masks = tile_width(&channels, t) / 8 / elem_bytes;
    for (int64_t i = 0; i < I; ++i) {
      if (at > UINT32_MAX) return -1;
      starts[t * I + i] = static_cast<uint32_t>(at);
      at += masks + counts[static_cast<size_t>(t * I + i)];
    }
  }
  if (at > UINT32_MAX) return -1;
  starts[tiles * I] = static_cast<uint32_t>(at);
  return at;
}

void fill_channels(const Weight& weight, const ChannelWeight& channels, int64_t elem_bytes,
                   int threads, void* data) {
  PackCall call{weight, channels, elem_bytes, nullptr, static_cast<char*>(data)};
  each_tile(call, threads, elem_bytes == 4 ? fill_tile<uint32_t> : fill_tile<uint16_t>);
}
