// Self test of plans and of the operations over many tokens: buffers of exact size, results against
// doubles, the same bits for any number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "plan.h"
#include "select.h"
#include "selftest.h"
#include "tokens_calls.h"

namespace {

std::mt19937 random_bits(5);

float uniform() { return static_cast<float>(random_bits() % 2001) / 1000.0f - 1.0f; }

// Values of a dtype in a buffer of their exact size, and what they are as doubles.
struct Values {
  DType dtype;
  std::vector<char> data;

  Values(DType dtype, size_t count, bool poisoned = false)
      : dtype(dtype), data(count * elem_bytes(dtype), '\x7f') {
    if (poisoned) return;
    for (size_t i = 0; i < count; ++i) {
      uint32_t bits;
      const float value = uniform();
      std::memcpy(&bits, &value, 4);
      bits &= 0xffff0000;  // exact in bfloat16
      float rounded;
      std::memcpy(&rounded, &bits, 4);
      // float16 has fewer exponents: multiples of 1/8 are exact in every dtype
      encode(dtype, dtype == kF16 ? std::round(rounded * 8) / 8 : rounded,
             data.data() + i * elem_bytes(dtype));
    }
  }
  double operator[](size_t i) const { return decode(dtype, data.data() + i * elem_bytes(dtype)); }
  void* at() { return data.data(); }
};

double eps(DType dtype) { return dtype == kBF16 ? 1 / 128.0 : dtype == kF16 ? 1 / 1024.0 : 1e-5; }

bool near(double found, double exact, DType dtype, double scale = 1) {
  return std::fabs(found - exact) <= 2 * eps(dtype) * (std::fabs(exact) + 0.05 * scale) + 1e-6;
}

struct Shape {
  int64_t heads, kv_heads, head_size, rotary, window;
};

// q, k, v of new tokens behind a past, in a cache of exactly the size that is promised: each row has
// one page of 32 tokens or two of 16.
struct Decoding {
  DType dtype;
  Shape shape;
  int64_t capacity = 32, page_count;
  std::vector<int64_t> positions, pages;
  Values q, k, v, out, keys, values;
  std::vector<float> cosine, sine;

  Decoding(DType dtype, Shape s, int64_t page_count)
      : dtype(dtype), shape(s), page_count(page_count), positions{0, 17, -1, 31},
        pages(page_count == 1 ? std::vector<int64_t>{2, 0, 3, 1}
                              : std::vector<int64_t>{5, 0, 2, 7, 4, 4, 6, 1}),
        q(dtype, size_t(4 * s.heads * s.head_size)), k(dtype, size_t(4 * s.kv_heads * s.head_size)),
        v(dtype, size_t(4 * s.kv_heads * s.head_size)),
        out(dtype, size_t(4 * s.heads * s.head_size), true),
        keys(dtype, size_t(4 * s.kv_heads * capacity * s.head_size)),
        values(dtype, size_t(4 * s.kv_heads * capacity * round_to_lanes(s.head_size))),
        cosine(size_t(capacity * s.rotary), 1.0f), sine(size_t(capacity * s.rotary), 0.0f) {}

  AttentionStep step() {
    return {q.at(),          k.at(),          v.at(),           cosine.data(),   sine.data(),
            keys.at(),       values.at(),     pages.data(),     positions.data(), out.at(),
            4,               shape.heads,     shape.kv_heads,   shape.head_size, shape.rotary,
            page_size(),     4 * page_count,  page_count,       shape.window,    0.5f};
  }
  int64_t page_size() const { return capacity / page_count; }
  int64_t row(int64_t b, int64_t kv, int64_t t) const {
    const int64_t page = pages[size_t(b * page_count + t / page_size())];
    return (page * shape.kv_heads + kv) * page_size() + t % page_size();
  }
  double key(int64_t b, int64_t kv, int64_t t, int64_t d) const {
    const int64_t at = row(b, kv, t), group = at / kKeyLanes * kKeyLanes;
    return keys[size_t(group * shape.head_size + d * kKeyLanes + at % kKeyLanes)];
  }
  double value(int64_t b, int64_t kv, int64_t t, int64_t d) const {
    return values[size_t(row(b, kv, t) * round_to_lanes(shape.head_size) + d)];
  }
  // After a run: the cache holds the new token, angles are zero, so q is what it was.
  bool right() const {
    const int64_t D = shape.head_size;
    for (int64_t b = 0; b < 4; ++b)
      for (int64_t h = 0; h < shape.heads; ++h) {
        const int64_t kv = h / (shape.heads / shape.kv_heads), last = positions[b];
        const int64_t first = shape.window && last >= shape.window ? last - shape.window + 1 : 0;
        std::vector<double> exact(static_cast<size_t>(D), 0.0);
        double sum = 0;
        for (int64_t t = first; t <= last; ++t) {
          double score = 0;
          for (int64_t d = 0; d < D; ++d)
            score += q[size_t((b * shape.heads + h) * D + d)] * key(b, kv, t, d);
          const double weight = std::exp(score * 0.5);
          sum += weight;
          for (int64_t d = 0; d < D; ++d) exact[size_t(d)] += weight * value(b, kv, t, d);
        }
        for (int64_t d = 0; d < D; ++d) {
          const double expected = last < 0 ? 0 : exact[size_t(d)] / sum;
          if (!near(out[size_t((b * shape.heads + h) * D + d)], expected, dtype)) return false;
        }
      }
    return true;
  }
};

void test_decode_attention(const Isa& isa, DType dtype, const Shape& shape, int64_t page_count) {
  Decoding decoding(dtype, shape, page_count);
  Plan plan(isa, dtype);
  plan.add_attention(decoding.step());
  bool ran = plan.run(1, -1);
  expect(ran && decoding.right(), "decode attention", isa, dtype, shape.heads, shape.head_size,
         page_count);
  const std::vector<char> first = decoding.out.data;
  for (int threads = 2; threads <= 5; ++threads) {
    std::fill(decoding.out.data.begin(), decoding.out.data.end(), '\x7f');
    ran = plan.run(threads, -1);
    expect(ran && decoding.out.data == first, "threads change decode attention", isa, dtype,
           shape.heads, shape.head_size, threads);
  }
  std::fill(decoding.out.data.begin(), decoding.out.data.end(), '\x7f');
  ran = plan.run(2, 3);
  const size_t row = first.size() / 4;
  expect(ran && std::equal(first.begin(), first.end() - long(row), decoding.out.data.begin()) &&
             decoding.out.data.back() == '\x7f',
         "fewer rows change decode attention", isa, dtype, shape.heads, shape.head_size, 3);
  decoding.positions[1] = decoding.capacity;
  expect(!plan.run(1, 4), "a position behind the pages ran", isa, dtype, 0, 0, 0);
  expect(plan.run(1, 1), "a row that is not run was refused", isa, dtype, 0, 0, 0);
  decoding.positions[1] = 3, decoding.pages[size_t(page_count)] = 4 * page_count;
  expect(!plan.run(1, -1), "a page behind the cache ran", isa, dtype, 0, 0, 0);
}

void test_decode_attention(const Isa& isa, DType dtype) {
  for (const Shape& shape : {Shape{1, 1, 2, 2, 0}, Shape{8, 1, 64, 64, 0}, Shape{6, 2, 33, 16, 0},
                             Shape{4, 4, 80, 40, 5}, Shape{9, 3, 16, 0, 0}})
    for (int64_t page_count : {1, 2}) test_decode_attention(isa, dtype, shape, page_count);
}

// Everything of a block behind each other; only that it is clean and does not depend on threads.
void test_whole_plan(const Isa& isa, DType dtype) {
  const int64_t width = 65, inner = 37, batch = 3;
  Values x(dtype, size_t(batch * width)), norm(dtype, size_t(width));
  Values gate_weight(dtype, size_t(inner * width)), up_weight(dtype, size_t(inner * width));
  Values down_weight(dtype, size_t(width * inner)), bias(dtype, size_t(inner));
  Values normed(dtype, size_t(batch * width), true), gate(dtype, size_t(batch * inner), true);
  Values up(dtype, size_t(batch * inner), true);
  const auto dense = [](Values& w, int64_t O, int64_t I) {
    return Weight{nullptr, w.at(), nullptr, 0, O, I, O * I, I};
  };
  Plan plan(isa, dtype);
  plan.add_rms_norm({x.at(), norm.at(), normed.at(), batch, width, 1e-5f}, batch);
  plan.add_linears(normed.at(), batch, width,
                   {{dense(gate_weight, inner, width), bias.at(), gate.at()},
                    {dense(up_weight, inner, width), nullptr, up.at()}},
                   false);
  plan.add_silu_mul({gate.at(), up.at(), gate.at(), batch * inner}, batch);
  plan.add_linears(gate.at(), batch, inner, {{dense(down_weight, width, inner), nullptr, x.at()}},
                   true);
  const std::vector<char> start = x.data;
  std::vector<char> results[4];
  for (int threads = 1; threads <= 4; ++threads) {
    x.data = start;
    bool ran = true;
    // a replay adds to x again: many meetings of the threads
    for (int token = 0; token < 20; ++token) ran = ran && plan.run(threads, -1);
    results[threads - 1] = x.data;
    expect(ran && x.data == results[0], "plan", isa, dtype, width, inner, threads);
  }
}

void test_rows(const Isa& isa, DType dtype) {
  const int64_t tokens = 19, heads = 3, size = 10, rotary = 4, pitch = heads * size + 5;
  const DecodeKernel& kernel = isa.decode[dtype];
  Values x(dtype, size_t(tokens * pitch - 5)), moved(dtype, size_t(tokens * heads * size), true);
  std::vector<float> cosine(size_t(tokens * rotary), 0.0f), sine(cosine.size(), 1.0f);
  run_rotate(kernel, 2, {x.at(), moved.at(), cosine.data(), sine.data(), 1, tokens, heads, size,
                         rotary, pitch});
  bool right = true;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t d = 0; d < size; ++d) {
        const auto own = [&](int64_t at) { return x[size_t(t * pitch + h * size + at)]; };
        const double exact = d < 2 ? -own(d + 2) : d < 4 ? own(d - 2) : own(d);
        right = right && moved[size_t((h * tokens + t) * size + d)] == exact;
      }
  expect(right, "rotate", isa, dtype, tokens, size, heads);
  const int64_t width = 301;
  Values wide(dtype, size_t(tokens * width));
  std::vector<double> sums(size_t(width), 1.0);
  run_add_squares(kernel, 3, {wide.at(), sums.data(), tokens, width});
  for (int64_t c = 0; c < width; ++c) {
    double exact = 1;
    for (int64_t t = 0; t < tokens; ++t)
      exact += wide[size_t(t * width + c)] * wide[size_t(t * width + c)];
    right = right && std::fabs(sums[size_t(c)] - exact) < 1e-4;
  }
  expect(right, "squares", isa, dtype, tokens, width, 0);
}

void test_select(const Isa& isa) {
  const int64_t rows = 37, width = 100;
  std::vector<float> scores(size_t(rows * width));
  std::vector<int64_t> counts(static_cast<size_t>(rows));
  for (float& score : scores) score = std::round(uniform() * 8) / 8;  // many ties
  for (int64_t r = 0; r < rows; ++r) counts[size_t(r)] = r * 100 / 36;
  for (int threads : {1, 3}) {
    std::vector<uint8_t> marked(scores.size(), 7);
    run_mark_lowest(threads, scores.data(), rows, width, counts.data(), marked.data());
    bool right = true;
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<int64_t> order(static_cast<size_t>(width));
      for (int64_t i = 0; i < width; ++i) order[size_t(i)] = i;
      const float* row = scores.data() + r * width;
      std::stable_sort(order.begin(), order.end(),
                       [row](int64_t a, int64_t b) { return row[a] < row[b]; });
      for (int64_t i = 0; i < width; ++i)
        right = right && marked[size_t(r * width + order[size_t(i)])] == (i < counts[size_t(r)]);
    }
    expect(right, "select", isa, kF32, rows, width, threads);
  }
}

void test_gram(const Isa& isa) {
  for (int64_t width : {1, 47, 49, 130})
    for (int64_t tokens : {1, 2, 33}) {
      Values x(kBF16, size_t(tokens * width));
      const int64_t panels = (width + kGramPanel - 1) / kGramPanel;
      std::vector<uint32_t> packed(size_t(panels * ((tokens + 1) / 2) * kGramPanel));
      std::vector<float> sum(size_t(width * width), 0.0f);
      const Factor factor = {reinterpret_cast<uint16_t*>(x.at()), width, packed.data()};
      run_gram(*isa.gram(), 3, {factor, factor, tokens, sum.data(), true});
      bool right = true;
      for (int64_t i = 0; i < width; ++i)
        for (int64_t j = 0; j <= i; ++j) {
          double exact = 0;
          for (int64_t t = 0; t < tokens; ++t)
            exact += x[size_t(t * width + i)] * x[size_t(t * width + j)];
          right = right && std::fabs(sum[size_t(i * width + j)] - exact) < 1e-4;
        }
      expect(right, "gram", isa, kBF16, width, tokens, 0);
    }
}

void test_cross(const Isa& isa) {
  for (const auto& [height, width] : {std::pair<int64_t, int64_t>{1, 1}, {49, 130}, {97, 7}})
    for (int64_t tokens : {1, 2, 33}) {
      Values a(kBF16, size_t(tokens * height)), b(kBF16, size_t(tokens * width));
      const auto entries = [&](int64_t columns) {
        return size_t((columns + kGramPanel - 1) / kGramPanel * ((tokens + 1) / 2) * kGramPanel);
      };
      std::vector<uint32_t> packed_a(entries(height)), packed_b(entries(width));
      std::vector<float> sum(size_t(height * width), 1.0f);
      const Factor left = {reinterpret_cast<uint16_t*>(a.at()), height, packed_a.data()};
      const Factor right = {reinterpret_cast<uint16_t*>(b.at()), width, packed_b.data()};
      run_gram(*isa.gram(), 3, {left, right, tokens, sum.data(), false});
      bool right_sums = true;
      for (int64_t i = 0; i < height; ++i)
        for (int64_t j = 0; j < width; ++j) {
          double exact = 1;
          for (int64_t t = 0; t < tokens; ++t)
            exact += a[size_t(t * height + i)] * b[size_t(t * width + j)];
          right_sums = right_sums && std::fabs(sum[size_t(i * width + j)] - exact) < 1e-4;
        }
      expect(right_sums, "cross", isa, kBF16, width, tokens, 0);
    }
}

void test_causal_attention(const Isa& isa) {
  const AttentionKernel& kernel = *isa.attention();
  for (const auto& [tokens, heads, kv_heads, size] :
       {std::tuple<int64_t, int64_t, int64_t, int64_t>{1, 1, 1, 2}, {70, 4, 2, 64}, {9, 3, 1, 34}}) {
    Values q(kBF16, size_t(heads * tokens * size)), k(kBF16, size_t(kv_heads * tokens * size));
    Values v(kBF16, size_t(kv_heads * tokens * size)), out(kBF16, q.data.size() / 2, true);
    const auto halves = [](Values& x) { return reinterpret_cast<uint16_t*>(x.at()); };
    for (int threads : {1, 3}) {
      std::vector<char> scratch(size_t(threads * kernel.scratch_bytes(tokens, size)) + 64);
      void* aligned = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64);
      const AttentionArgs head{halves(q), halves(k), halves(v), halves(out), size, size,
                               size,      size,      tokens,    size,        0.5f};
      const int64_t one = tokens * size;
      run_attention(kernel, threads, {head, 1, heads, kv_heads, 0, one, 0, one, 0, one, 0, one,
                                      aligned});
      bool right = true;
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t t = 0; t < tokens; ++t) {
          const int64_t kv = h / (heads / kv_heads);
          std::vector<double> exact(static_cast<size_t>(size), 0.0);
          double sum = 0;
          for (int64_t j = 0; j <= t; ++j) {
            double score = 0;
            for (int64_t d = 0; d < size; ++d)
              score += q[size_t(h * one + t * size + d)] * k[size_t(kv * one + j * size + d)];
            const double weight = std::exp(score * 0.5);
            sum += weight;
            for (int64_t d = 0; d < size; ++d)
              exact[size_t(d)] += weight * v[size_t(kv * one + j * size + d)];
          }
          // weights are rounded to bfloat16 before they meet the values, which are up to 1
          for (int64_t d = 0; d < size; ++d)
            right = right && near(out[size_t(h * one + t * size + d)], exact[size_t(d)] / sum,
                                  kBF16, 5);
        }
      expect(right, "causal attention", isa, kBF16, tokens, size, heads);
    }
  }
}

}  // namespace

void test_tokens_and_plans(const Isa& isa) {
  for (int dtype = 0; dtype < kDTypes; ++dtype) {
    test_decode_attention(isa, DType(dtype));
    test_whole_plan(isa, DType(dtype));
    test_rows(isa, DType(dtype));
  }
  test_select(isa);
  if (isa.gram) test_gram(isa);
  if (isa.gram) test_cross(isa);
  if (isa.attention) test_causal_attention(isa);
}
