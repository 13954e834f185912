// Self test of channel-major weights: buffers of exact size, products against doubles, the same bits
// for any number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "pack_channels.h"
#include "plan.h"
#include "selftest.h"

namespace {

std::mt19937 random_bits(7);

// Quarters: exact in every dtype, and so are their float32 sums, whatever the order of addition.
float quarter() { return static_cast<float>(static_cast<int>(random_bits() % 17) - 8) * 0.25f; }

std::vector<char> encoded(DType dtype, const std::vector<float>& values) {
  std::vector<char> out(values.size() * elem_bytes(dtype));
  for (size_t i = 0; i < values.size(); ++i)
    encode(dtype, values[i], out.data() + i * elem_bytes(dtype));
  return out;
}

// A weight in both orders, in buffers of the size that is promised.
struct Channels {
  DType dtype;
  int64_t O, I, tile;
  std::vector<float> dense;
  std::vector<uint32_t> starts;
  std::vector<char> data, plain;
  int64_t pitch;

  Channels(DType dtype, int64_t O, int64_t I, int64_t tile, double density)
      : dtype(dtype), O(O), I(I), tile(tile), dense(static_cast<size_t>(O * I)),
        pitch((O + kWord - 1) / kWord * kWord) {
    std::vector<uint8_t> bitmask(static_cast<size_t>(O * ((I + 7) / 8)));
    std::vector<int32_t> offsets{0};
    std::vector<float> kept;
    std::vector<float> turned(static_cast<size_t>(I * pitch + kWord));
    for (int64_t o = 0; o < O; ++o) {
      for (int64_t i = 0; i < I; ++i) {
        if (random_bits() % 1000 >= density * 1000) continue;
        const float value = quarter();
        dense[static_cast<size_t>(o * I + i)] = turned[static_cast<size_t>(i * pitch + o)] = value;
        kept.push_back(value);
        bitmask[static_cast<size_t>(o * ((I + 7) / 8) + i / 8)] |= uint8_t(1 << i % 8);
      }
      offsets.push_back(static_cast<int32_t>(kept.size()));
    }
    plain = encoded(dtype, turned);
    const std::vector<char> values = encoded(dtype, kept);
    const Weight stored{bitmask.data(), values.data(), offsets.data(), 4, O, I, offsets.back(), 0};
    const int64_t bytes = static_cast<int64_t>(elem_bytes(dtype));
    starts.resize(static_cast<size_t>((O + tile - 1) / tile * I + 1));
    const int64_t elements = measure_channels(stored, tile, bytes, 2, starts.data());
    data.resize(static_cast<size_t>((elements + kWord) * bytes), '\x7f');
    fill_channels(stored, packed(), bytes, 2, data.data());
  }
  ChannelWeight packed() const { return {data.data(), starts.data(), O, I, tile, 0}; }
  ChannelWeight unpacked() const { return {plain.data(), nullptr, O, I, tile, pitch}; }
};

struct Run {
  std::vector<char> y;
  int64_t counts[3];
};

Run multiply(const Isa& isa, const Channels& c, const ChannelWeight& weight, const void* x,
             int64_t batch, const float* thresholds, int threads) {
  Run run{std::vector<char>(static_cast<size_t>(batch * c.O) * elem_bytes(c.dtype), '\x7f'), {}};
  Plan plan(isa, c.dtype);
  plan.add_channels({x, nullptr, thresholds, c.I, batch, run.counts},
                    {{weight, nullptr, run.y.data()}}, false, false);
  plan.run(threads, -1);
  return run;
}

bool exact(const Channels& c, const Run& run, const std::vector<float>& x,
           const std::vector<float>& thresholds) {
  const float eps = c.dtype == kBF16 ? 1 / 256.0f : c.dtype == kF16 ? 1 / 2048.0f : 0;
  for (size_t m = 0; m < thresholds.size(); ++m) {
    for (int64_t o = 0; o < c.O; ++o) {
      double sum = 0;
      for (int64_t i = 0; i < c.I; ++i) {
        const float input = x[m * static_cast<size_t>(c.I) + static_cast<size_t>(i)];
        const double weight = c.dense[static_cast<size_t>(o * c.I + i)];
        if (std::fabs(input) > thresholds[m]) sum += weight * input;
      }
      const size_t at = m * static_cast<size_t>(c.O) + static_cast<size_t>(o);
      const double found = decode(c.dtype, run.y.data() + at * elem_bytes(c.dtype));
      if (!(std::fabs(found - sum) <= eps * std::fabs(sum))) return false;
    }
  }
  return true;
}

void test_weight(const Isa& isa, const Channels& c, int64_t batch) {
  const auto check = [&](bool holds, const char* what) {
    expect(holds, what, isa, c.dtype, c.O, c.I, batch);
  };
  std::vector<float> x, thresholds;
  for (int64_t i = 0; i < batch * c.I; ++i) x.push_back(quarter());
  for (int64_t m = 0; m < batch; ++m)
    thresholds.push_back(m % 3 == 1 ? -1.0f : m % 5 == 4 ? INFINITY : 0.25f * float(m % 4));
  const std::vector<char> values = encoded(c.dtype, x);
  const Run first = multiply(isa, c, c.packed(), values.data(), batch, thresholds.data(), 1);
  check(exact(c, first, x, thresholds), "channels, packed");
  check(exact(c, multiply(isa, c, c.unpacked(), values.data(), batch, thresholds.data(), 1), x,
              thresholds),
        "channels, dense");
  const Run again = multiply(isa, c, c.packed(), values.data(), batch, thresholds.data(), 3);
  check(again.y == first.y && !std::memcmp(again.counts, first.counts, sizeof again.counts),
        "threads change the result");
  std::vector<char> piece;
  for (int64_t begin = 0; begin < c.O; begin += c.tile) {
    const int64_t end = std::min(begin + c.tile, c.O);
    piece.assign(static_cast<size_t>(c.I * (end - begin)) * elem_bytes(c.dtype), '\x7f');
    const ChannelWeight weight = c.packed();
    isa.channels[c.dtype].unpack(&weight, piece.data(), begin, end);
    bool same = true;
    for (int64_t i = 0; i < c.I; ++i)
      for (int64_t o = begin; o < end; ++o)
        same &= decode(c.dtype, piece.data() + static_cast<size_t>(i * (end - begin) + o - begin) *
                                                   elem_bytes(c.dtype)) ==
                c.dense[static_cast<size_t>(o * c.I + i)];
    check(same, "unpack channels");
  }
}

}  // namespace

void test_channels(const Isa& isa) {
  const int64_t shapes[][3] = {
      {1, 1, 64}, {64, 64, 64}, {130, 77, 64}, {200, 9, 128}, {65, 130, 128}};
  for (int dtype = 0; dtype < kDTypes; ++dtype)
    for (const auto& shape : shapes)
      for (double density : {0.0, 0.5, 1.0}) {
        const Channels c(DType(dtype), shape[0], shape[1], shape[2], density);
        for (int64_t batch : {1, 2, 3, 4, 5, 6, 7, 8, 11}) test_weight(isa, c, batch);
      }
}
