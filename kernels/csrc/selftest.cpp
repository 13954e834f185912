// Stand-alone test of everything below Python, for sanitizers and emulators: no torch, no Python.
// Every buffer is allocated with its exact size, so that AddressSanitizer sees any stray access.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "linear.h"
#include "selftest.h"
#include "threads.h"

namespace {

int failures = 0;

}  // namespace

void expect(bool holds, const char* what, const Isa& isa, int dtype, int64_t rows, int64_t columns,
            int64_t batch) {
  if (holds) return;
  ++failures;
  std::printf("FAILED %s: %s dtype %d weight [%lld, %lld] batch %lld\n", what, isa.name, dtype,
              (long long)rows, (long long)columns, (long long)batch);
}

size_t elem_bytes(DType dtype) { return dtype == kF32 ? 4 : 2; }

void encode(DType dtype, float value, char* out) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (dtype == kF32) {
    std::memcpy(out, &bits, 4);
    return;
  }
  uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (dtype == kF16 && value != 0)
    half = static_cast<uint16_t>((bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - 0x38000000) >> 13);
  else if (dtype == kF16)
    half = static_cast<uint16_t>(bits >> 16 & 0x8000);
  std::memcpy(out, &half, 2);
}

float decode(DType dtype, const char* in) {
  uint32_t bits;
  uint16_t half;
  float value;
  std::memcpy(&half, in, 2);
  bits = uint32_t(half) << 16;
  if (dtype == kF16) {
    bits = uint32_t(half & 0x8000) << 16;
    if (half & 0x7fff) bits |= (uint32_t(half & 0x7fff) << 13) + 0x38000000;
  }
  if (dtype == kF32) std::memcpy(&bits, in, 4);
  std::memcpy(&value, &bits, 4);
  return value;
}

namespace {

// Small quarters: exact in every dtype, and so are their float32 sums, whatever the order of
// addition. Results are the exact sum, rounded once to the dtype.
float small_value(std::mt19937& random) { return static_cast<int>(random() % 9) * 0.5f - 2.25f; }

std::vector<char> encode_all(DType dtype, const std::vector<float>& values) {
  std::vector<char> out(values.size() * elem_bytes(dtype));
  for (size_t i = 0; i < values.size(); ++i)
    encode(dtype, values[i], out.data() + i * elem_bytes(dtype));
  return out;
}

struct Case {
  DType dtype;
  int64_t rows, columns, batch;
  std::vector<float> dense, x, bias;
  std::vector<uint8_t> bitmask;
  std::vector<char> values, dense_values, x_values, bias_values;
  std::vector<int32_t> offsets{0};

  Case(DType dtype, int64_t rows, int64_t columns, int64_t batch, double density, unsigned seed)
      : dtype(dtype), rows(rows), columns(columns), batch(batch) {
    std::mt19937 random(seed);
    std::vector<float> kept;
    const int64_t pitch = (columns + 7) / 8;
    bitmask.resize(static_cast<size_t>(rows * pitch));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) {
        const bool keep = random() % 1000 < density * 1000;
        dense.push_back(keep ? small_value(random) : 0);
        if (!keep) continue;
        kept.push_back(dense.back());
        bitmask[static_cast<size_t>(row * pitch + column / 8)] |= uint8_t(1 << column % 8);
      }
      offsets.push_back(static_cast<int32_t>(kept.size()));
    }
    for (int64_t i = 0; i < batch * columns; ++i) x.push_back(static_cast<int>(random() % 3) - 1);
    for (int64_t i = 0; i < rows; ++i) bias.push_back(small_value(random));
    values = encode_all(dtype, kept);
    dense_values = encode_all(dtype, dense);
    x_values = encode_all(dtype, x);
    bias_values = encode_all(dtype, bias);
  }

  int64_t nnz() const { return offsets.back(); }
  Weight packed() const {
    return {bitmask.data(), values.data(), offsets.data(), 4, rows, columns, nnz(), 0};
  }
  Weight unpacked() const {
    return {nullptr, dense_values.data(), nullptr, 0, rows, columns, rows * columns, columns};
  }
  // y [batch, rows] in the dtype.
  std::vector<char> multiply(const Isa& isa, const Weight& weight, int threads) const {
    std::vector<char> y(static_cast<size_t>(batch * rows) * elem_bytes(dtype), '\x7f');
    run_linear(isa, dtype, threads, weight, x_values.data(), batch, bias_values.data(), y.data());
    return y;
  }
};

bool close_to_exact(const Case& c, const std::vector<char>& y) {
  const float eps = c.dtype == kBF16 ? 1 / 256.0f : c.dtype == kF16 ? 1 / 2048.0f : 0;
  for (int64_t m = 0; m < c.batch; ++m) {
    for (int64_t o = 0; o < c.rows; ++o) {
      double exact = c.bias[o];
      for (int64_t i = 0; i < c.columns; ++i)
        exact += double(c.dense[o * c.columns + i]) * c.x[m * c.columns + i];
      const float found = decode(c.dtype, y.data() + (m * c.rows + o) * elem_bytes(c.dtype));
      if (!(std::fabs(found - exact) <= eps * std::fabs(exact))) return false;
    }
  }
  return true;
}

void test_case(const Isa& isa, const Case& c) {
  const auto check = [&](bool holds, const char* what) {
    expect(holds, what, isa, c.dtype, c.rows, c.columns, c.batch);
  };
  check(check_weight(c.packed()).fault == Fault::none, "check_weight");
  const std::vector<char> y = c.multiply(isa, c.packed(), 1);
  check(close_to_exact(c, y), "sparse");
  check(close_to_exact(c, c.multiply(isa, c.unpacked(), 1)), "dense");
  for (int threads = 2; threads <= 3; ++threads)
    check(c.multiply(isa, c.packed(), threads) == y, "threads change the result");
  std::vector<char> dense(c.dense_values.size(), '\x7f');
  run_unpack(isa, c.dtype, 2, c.packed(), dense.data(), 0, c.rows);
  check(dense == c.dense_values, "unpack");
}

void test_faults(const Isa& isa) {
  const auto fault_of = [](Case c, auto damage) {
    damage(c);
    return check_weight(c.packed()).fault;
  };
  const Case good(kBF16, 5, 13, 1, 0.5, 7);
  const auto check = [&](bool holds, const char* what) { expect(holds, what, isa, 0, 5, 13, 1); };
  check(fault_of(good, [](Case& c) { c.bitmask[3] ^= 1; }) == Fault::row_count, "row_count");
  check(fault_of(good, [](Case& c) { c.bitmask[1] |= 0x80; }) == Fault::padding, "padding");
  check(fault_of(good, [](Case& c) { c.offsets[0] = 1; }) == Fault::offsets_start, "start");
  check(fault_of(good, [](Case& c) { c.offsets[2] = -1; }) == Fault::offsets_order, "negative");
  check(fault_of(good, [](Case& c) { c.offsets[2] = 1 << 30; }) == Fault::offsets_order, "beyond");
  Weight shorter = good.packed();
  shorter.nnz += 1;
  check(check_weight(shorter).fault == Fault::offsets_end, "end");
}

// Several threads of the program call at once, each asking for several threads.
void test_concurrent_calls(const Isa& isa) {
  const Case c(kF32, 67, 200, 2, 0.5, 11);
  const std::vector<char> y = c.multiply(isa, c.packed(), 1);
  std::vector<int> wrong(4);
  std::vector<std::thread> callers;
  for (int& count : wrong)
    callers.emplace_back([&] {
      for (int i = 0; i < 25; ++i) count += c.multiply(isa, c.packed(), 3) != y;
    });
  for (std::thread& caller : callers) caller.join();
  for (int count : wrong) expect(count == 0, "concurrent calls", isa, kF32, 67, 200, 2);
}

}  // namespace

int main() {
  const Isa* isas[kMaxIsas];
  const int count = supported_isas(isas);
  const int64_t shapes[][2] = {{0, 8}, {1, 1}, {3, 7}, {5, 64}, {13, 65}, {9, 200}, {4, 257}};
  for (int i = 0; i < count; ++i) {
    unsigned seed = 0;
    for (int dtype = 0; dtype < kDTypes; ++dtype)
      for (const auto& shape : shapes)
        for (double density : {0.0, 0.3, 0.5, 1.0})
          for (int64_t batch : {0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 17, 53})
            test_case(*isas[i], Case(DType(dtype), shape[0], shape[1], batch, density, ++seed));
    test_faults(*isas[i]);
    test_concurrent_calls(*isas[i]);
    test_tokens_and_plans(*isas[i]);
    test_channels(*isas[i]);
    std::printf("%s: done, %s threads\n", isas[i]->name, thread_pool_name());
  }
  std::printf(failures ? "%d FAILED\n" : "all passed\n", failures);
  return failures != 0;
}
