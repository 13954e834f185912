// The row loop that every instruction set shares. A translation unit defines, per dtype, a policy
// of vector operations and instantiates this loop with it. Everything has internal linkage and
// nothing comes from the C++ library: an inline function compiled here with wider instructions
// must never be the copy that the linker keeps for a smaller machine.
//
// A policy P has
//   Elem, X         stored element; element of a prepared input
//   Acc, W          accumulator of one output; kCols expanded weights
//   kCols           columns of one step: 8, 16, 32 or 64
//   kRows(B, sparse)  rows in flight for B inputs: enough chains to hide latency, few enough
//                   registers and streams of memory (measured)
//   kTileRows, kTileInputs  sums in registers where there are many inputs
//   kExpandRows, kExpandInputs  the same while weights are expanded, which needs registers too;
//                   inputs at most kNarrowBatch
//   zero() add(acc, acc) fma(acc, w, x) reduce(acc) to_float(elem) from_float(f)
//   reduce_many(accs, out)  reduce of kReduced accumulators behind each other, with the same bits
//   place(c)        where a prepared input holds column c
//   expand(mask, p) kept values at p -> kCols weights; may read kCols elements
//   expand_exact(mask, p)  the same, reading popcount(mask) elements only
//   load(p) load_exact(p, n)  dense weights: kCols of them; the first n, zeros behind
//   store(w, p)     kCols weights as elements
// The sum of one output has one fixed order, whatever the rows in flight, the batch and the thread
// are: results are bit-identical for any number of threads and any number of inputs.
#pragma once

#include "kernels.h"

namespace {

#define UNROLL _Pragma("GCC unroll 16")
#define INLINE inline __attribute__((always_inline))

template <int Cols> struct MaskWord;
template <> struct MaskWord<8> { typedef uint8_t type; };
template <> struct MaskWord<16> { typedef uint16_t type; };
template <> struct MaskWord<32> { typedef uint32_t type; };
template <> struct MaskWord<64> { typedef uint64_t type; };

template <class T> INLINE T load_word(const uint8_t* p) {
  T word;
  __builtin_memcpy(&word, p, sizeof(T));
  return word;
}

// The last, partial mask word of a row: byte by byte, because the next row starts right behind.
INLINE uint64_t tail_word(const uint8_t* p, int64_t columns) {
  uint64_t word = 0;
  for (int64_t byte = 0; byte * 8 < columns; ++byte) word |= (uint64_t)p[byte] << (8 * byte);
  return word;
}

constexpr int64_t kNarrowBatch = 8, kPrefetchBytes = 1024;
// Sums of this many columns are added up: long rows lose less than in one running sum.
constexpr int64_t kSumColumns = 1024;

// Weights of one step at the columns of mask_at; moves *value_at behind them and asks for the
// lines that the step kPrefetchBytes later will read. Into the first cache: past the others (`nta`)
// Emerald Rapids leaves half of memory idle, and Zen 4 gains nothing (both measured).
template <class P, bool Sparse, bool Exact>
INLINE typename P::W next_weights(const uint8_t* mask_at, const typename P::Elem** value_at) {
  typename P::W weights;
  if (Sparse) {
    const auto mask = load_word<typename MaskWord<P::kCols>::type>(mask_at);
    weights = Exact ? P::expand_exact(mask, *value_at) : P::expand(mask, *value_at);
    *value_at += __builtin_popcountll(mask);
  } else {
    weights = P::load(*value_at);
    *value_at += P::kCols;
  }
  constexpr int bytes = P::kCols * sizeof(typename P::Elem);
  UNROLL for (int line = 0; line < bytes; line += 64)
    __builtin_prefetch((const char*)*value_at + kPrefetchBytes + line, 0, 3);
  return weights;
}

// The same for the last columns of a row, fewer than kCols.
template <class P, bool Sparse, bool Exact>
INLINE typename P::W last_weights(const uint8_t* mask_at, const typename P::Elem* value_at,
                                  int64_t columns) {
  if (!Sparse) return P::load_exact(value_at, columns);
  const uint64_t mask = tail_word(mask_at, columns);
  return Exact ? P::expand_exact(mask, value_at) : P::expand(mask, value_at);
}

// One output row per stream r: R rows at once, each `stride` rows behind the one before.
template <class P, bool Sparse, bool Exact, int R, int B>
INLINE void multiply_rows(const LinearArgs* a, int64_t row, int64_t stride) {
  typedef typename P::Elem Elem;
  const Weight* w = a->weight;
  const int64_t columns = w->in_features, full = columns / P::kCols * P::kCols;
  const typename P::X* x = (const typename P::X*)a->x;
  const uint8_t* mask_at[R];
  const Elem* value_at[R];
  typename P::Acc acc[R][B], total[R][B];
  UNROLL for (int r = 0; r < R; ++r) {
    const int64_t o = row + r * stride;
    value_at[r] = (const Elem*)w->values + (Sparse ? row_start(w, o) : o * columns);
    // a dense weight has no mask; any valid address will do
    mask_at[r] = Sparse ? w->bitmask + o * mask_pitch(w) : (const uint8_t*)w->values;
    UNROLL for (int b = 0; b < B; ++b) acc[r][b] = total[r][b] = P::zero();
  }
  for (int64_t start = 0; start < full; start += kSumColumns) {
    const int64_t stop = start + kSumColumns < full ? start + kSumColumns : full;
    for (int64_t c = start; c < stop; c += P::kCols) {
      UNROLL for (int r = 0; r < R; ++r) {
        const auto weights =
            next_weights<P, Sparse, Exact>(mask_at[r] + c / 8, &value_at[r]);
        UNROLL for (int b = 0; b < B; ++b)
          acc[r][b] = P::fma(acc[r][b], weights, x + b * a->x_pitch + c);
      }
    }
    UNROLL for (int r = 0; r < R; ++r) {
      UNROLL for (int b = 0; b < B; ++b) {
        total[r][b] = P::add(total[r][b], acc[r][b]);
        acc[r][b] = P::zero();
      }
    }
  }
  if (full < columns) {
    UNROLL for (int r = 0; r < R; ++r) {
      const auto weights =
          last_weights<P, Sparse, Exact>(mask_at[r] + full / 8, value_at[r], columns - full);
      UNROLL for (int b = 0; b < B; ++b)
        total[r][b] = P::add(total[r][b], P::fma(P::zero(), weights, x + b * a->x_pitch + full));
    }
  }
  const Elem* bias = (const Elem*)a->bias;
  UNROLL for (int r = 0; r < R; ++r) {
    const int64_t o = row + r * stride;
    const float shift = bias ? P::to_float(bias[o]) : 0.0f;
    Elem* y = (Elem*)a->y + o;
    const Elem* addend = a->addend ? (const Elem*)a->addend + o : nullptr;
    UNROLL for (int b = 0; b < B; ++b) {
      const int64_t m = b * w->out_features;
      const float sum = P::reduce(total[r][b]) + shift;
      y[m] = P::from_float(addend ? sum + P::to_float(addend[m]) : sum);
    }
  }
}

// Wide loads reach up to kCols elements behind a row; near the end of the buffer that is not ours.
template <class P> INLINE bool may_overread(const Weight* w, int64_t row) {
  return row_start(w, row + 1) + P::kCols <= w->nnz;
}

// Rows [begin, end) as R streams of consecutive rows, so that each stream's prefetch runs on into
// the row it reads next.
template <class P, bool Sparse, int B>
void multiply_range(const LinearArgs* a, int64_t begin, int64_t end) {
  constexpr int R = P::kRows(B, Sparse);
  const int64_t stride = (end - begin) / R;
  for (int64_t row = begin; row < begin + stride; ++row) {
    if (!Sparse || may_overread<P>(a->weight, row + (R - 1) * stride)) {
      multiply_rows<P, Sparse, false, R, B>(a, row, stride);
    } else {
      for (int r = 0; r < R; ++r)
        multiply_rows<P, Sparse, true, 1, B>(a, row + r * stride, 0);
    }
  }
  for (int64_t row = begin + R * stride; row < end; ++row)
    multiply_rows<P, Sparse, Sparse, 1, B>(a, row, 0);
}

template <class P, bool Sparse> void multiply_narrow(const LinearArgs* a) {
  switch (a->batch) {
    case 1: return multiply_range<P, Sparse, 1>(a, a->begin, a->end);
    case 2: return multiply_range<P, Sparse, 2>(a, a->begin, a->end);
    case 3: return multiply_range<P, Sparse, 3>(a, a->begin, a->end);
    case 4: return multiply_range<P, Sparse, 4>(a, a->begin, a->end);
    case 5: return multiply_range<P, Sparse, 5>(a, a->begin, a->end);
    case 6: return multiply_range<P, Sparse, 6>(a, a->begin, a->end);
    case 7: return multiply_range<P, Sparse, 7>(a, a->begin, a->end);
    case 8: return multiply_range<P, Sparse, 8>(a, a->begin, a->end);
  }
}

// Many inputs: a panel of kPanelRows rows by kSumColumns columns is expanded once, into the second
// cache, and multiplied with kPanelInputs inputs, tile by tile; running totals wait in memory. The
// additions are those of multiply_rows, in its order.
constexpr int64_t kPanelRows = 48, kPanelInputs = 48;

// A step of a tile: a narrower one than kCols leaves registers for more sums.
template <class P> struct Unit {
  typedef typename P::W W;
  enum { kCols = P::kCols };
  static INLINE W load(const typename P::Elem* p) { return P::load(p); }
  static INLINE typename P::Acc fma(typename P::Acc acc, W w, const typename P::X* x) {
    return P::fma(acc, w, x);
  }
};

template <class P> struct Panel {
  const LinearArgs* a;
  int64_t row, rows, first, inputs;  // what the totals are of
  const typename P::Elem* value_at[kPanelRows];
  const char* next[kPanelRows];  // where each row's weights of the next columns begin
  const uint8_t* next_mask[kPanelRows];
  int64_t next_lines;  // how many lines of 64 bytes the weights are, about; 0: ask for nothing
  typename P::Acc totals[kPanelInputs][kPanelRows];
  typename P::Elem weights[kPanelRows * kSumColumns] __attribute__((aligned(64)));
};

// Expands whole steps of R rows into the panel and multiplies them with the first B inputs on the
// way: the expansion then hides behind the products.
template <class P, bool Exact, int R, int B>
INLINE void expand_rows(Panel<P>* p, int64_t r0, int64_t start, int64_t columns) {
  const LinearArgs* a = p->a;
  const typename P::X* x = (const typename P::X*)a->x + p->first * a->x_pitch + start;
  typename P::Elem* out = p->weights + r0 * kSumColumns;
  const uint8_t* mask_at[R];
  const typename P::Elem* value_at[R];
  typename P::Acc acc[R][B];
  UNROLL for (int r = 0; r < R; ++r) {
    mask_at[r] = a->weight->bitmask + (p->row + r0 + r) * mask_pitch(a->weight) + start / 8;
    value_at[r] = p->value_at[r0 + r];
    UNROLL for (int b = 0; b < B; ++b) acc[r][b] = P::zero();
  }
  for (int64_t c = 0; c < columns; c += P::kCols) {
    typename P::W w[R];
    UNROLL for (int r = 0; r < R; ++r) {
      w[r] = next_weights<P, true, Exact>(mask_at[r] + c / 8, &value_at[r]);
      P::store(w[r], out + r * kSumColumns + c);
    }
    UNROLL for (int b = 0; b < B; ++b)
      UNROLL for (int r = 0; r < R; ++r)
        acc[r][b] = P::fma(acc[r][b], w[r], x + b * a->x_pitch + c);
  }
  UNROLL for (int r = 0; r < R; ++r) {
    p->value_at[r0 + r] = value_at[r];
    UNROLL for (int b = 0; b < B; ++b)
      p->totals[b][r0 + r] = P::add(p->totals[b][r0 + r], acc[r][b]);
  }
}

// Columns [start, start + columns) of the panel's rows, times the first kExpandInputs inputs.
template <class P> INLINE void expand_panel(Panel<P>* p, int64_t start, int64_t columns) {
  constexpr int R = P::kExpandRows, B = P::kExpandInputs;
  int64_t r = 0;
  for (; r + R <= p->rows && may_overread<P>(p->a->weight, p->row + r + R - 1); r += R)
    expand_rows<P, false, R, B>(p, r, start, columns);
  for (; r < p->rows; ++r) expand_rows<P, true, 1, B>(p, r, start, columns);
}

// The last columns of the rows, fewer than a step, with zeros behind them.
template <class P, bool Sparse> INLINE void expand_tails(Panel<P>* p, int64_t full) {
  const Weight* w = p->a->weight;
  for (int64_t r = 0; r < p->rows; ++r) {
    const uint8_t* mask =
        Sparse ? w->bitmask + (p->row + r) * mask_pitch(w) + full / 8 : (const uint8_t*)w->values;
    P::store(last_weights<P, Sparse, true>(mask, p->value_at[r], w->in_features - full),
             p->weights + r * kSumColumns);
  }
}

// Asks for a tile's share of what comes next, so that memory works while the tiles multiply. The
// tiles of the first kExpandInputs inputs have no share: expand_rows is theirs.
template <class P, int R, int B>
INLINE void prefetch_share(const Panel<P>* p, int64_t r0, int64_t b0) {
  constexpr int64_t kMaskLines = kSumColumns / 8 / 64;
  const int64_t done = b0 - P::kExpandInputs, all = p->inputs - P::kExpandInputs;
  const int64_t begin = p->next_lines * done / all, end = p->next_lines * (done + B) / all;
  UNROLL for (int r = 0; r < R; ++r) {
    for (int64_t line = begin; line < end; ++line)
      __builtin_prefetch(p->next[r0 + r] + 64 * line, 0, 2);
    if (done == 0)
      UNROLL for (int line = 0; line < kMaskLines; ++line)
        __builtin_prefetch(p->next_mask[r0 + r] + 64 * line, 0, 2);
  }
}

template <class P, int R, int B>
INLINE void multiply_tile(Panel<P>* p, const typename P::Elem* weights, int64_t pitch, int64_t r0,
                          int64_t b0, int64_t start, int64_t columns) {
  const int64_t x_pitch = p->a->x_pitch;
  const typename P::X* x = (const typename P::X*)p->a->x + (p->first + b0) * x_pitch + start;
  weights += r0 * pitch;
  if (p->next_lines) prefetch_share<P, R, B>(p, r0, b0);
  typename P::Acc acc[R][B];
  UNROLL for (int r = 0; r < R; ++r) UNROLL for (int b = 0; b < B; ++b) acc[r][b] = P::zero();
  for (int64_t c = 0; c < columns; c += Unit<P>::kCols) {
    typename Unit<P>::W w[R];
    UNROLL for (int r = 0; r < R; ++r) w[r] = Unit<P>::load(weights + r * pitch + c);
    UNROLL for (int b = 0; b < B; ++b)
      UNROLL for (int r = 0; r < R; ++r)
        acc[r][b] = Unit<P>::fma(acc[r][b], w[r], x + b * x_pitch + c);
  }
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int b = 0; b < B; ++b)
      p->totals[b0 + b][r0 + r] = P::add(p->totals[b0 + b][r0 + r], acc[r][b]);
}

template <class P, int R>
INLINE void multiply_inputs(Panel<P>* p, const typename P::Elem* weights, int64_t pitch,
                            int64_t r0, int64_t b, int64_t start, int64_t columns) {
  constexpr int B = P::kTileInputs;
  for (; b + B <= p->inputs; b += B)
    multiply_tile<P, R, B>(p, weights, pitch, r0, b, start, columns);
  const int64_t left = p->inputs - b;
  if (left == 3) multiply_tile<P, R, 3>(p, weights, pitch, r0, b, start, columns);
  if (left == 2) multiply_tile<P, R, 2>(p, weights, pitch, r0, b, start, columns);
  if (left == 1) multiply_tile<P, R, 1>(p, weights, pitch, r0, b, start, columns);
}

// Adds columns [start, start + columns) to the totals of all inputs from `b` on. weights: of the
// first row, `pitch` apart.
template <class P>
void multiply_panel(Panel<P>* p, const typename P::Elem* weights, int64_t pitch, int64_t b,
                    int64_t start, int64_t columns) {
  constexpr int R = P::kTileRows;
  int64_t r = 0;
  for (; r + R <= p->rows; r += R) multiply_inputs<P, R>(p, weights, pitch, r, b, start, columns);
  for (; r + 2 <= p->rows; r += 2) multiply_inputs<P, 2>(p, weights, pitch, r, b, start, columns);
  for (; r < p->rows; ++r) multiply_inputs<P, 1>(p, weights, pitch, r, b, start, columns);
}

// Outputs of rows [r0, r0 + count) of the panel for one input, from their sums.
template <class P>
INLINE void finish_rows(const Panel<P>* p, const float* sums, int64_t b, int64_t r0, int count) {
  typedef typename P::Elem Elem;
  const LinearArgs* a = p->a;
  const int64_t o = p->row + r0, at = (p->first + b) * a->weight->out_features + o;
  const Elem* bias = a->bias ? (const Elem*)a->bias + o : nullptr;
  const Elem* addend = a->addend ? (const Elem*)a->addend + at : nullptr;
  Elem* y = (Elem*)a->y + at;
#pragma omp simd
  for (int r = 0; r < count; ++r) {
    const float sum = sums[r] + (bias ? P::to_float(bias[r]) : 0.0f);
    y[r] = P::from_float(addend ? sum + P::to_float(addend[r]) : sum);
  }
}

template <class P> void finish_panel(const Panel<P>* p) {
  constexpr int N = P::kReduced;
  for (int64_t b = 0; b < p->inputs; ++b) {
    float sums[N];
    int64_t r = 0;
    for (; r + N <= p->rows; r += N) {
      P::reduce_many(&p->totals[b][r], sums);
      finish_rows(p, sums, b, r, N);
    }
    for (; r < p->rows; ++r) {
      sums[0] = P::reduce(p->totals[b][r]);
      finish_rows(p, sums, b, r, 1);
    }
  }
}

// What will be read behind these columns: the rows' next ones, or the first ones of the next rows.
template <class P> INLINE void look_ahead(Panel<P>* p, int64_t column) {
  const Weight* w = p->a->weight;
  const int64_t I = w->in_features, columns = kSumColumns < I ? kSumColumns : I;
  const int64_t kept = w->nnz / w->out_features * columns / I;
  p->next_lines = (kept * (int64_t)sizeof(typename P::Elem) + 63) / 64;
  for (int64_t r = 0; r < p->rows; ++r) {
    const int64_t below = p->row + r + kPanelRows;
    const bool same_row = column + P::kCols <= I || below >= w->out_features;
    p->next[r] = (const char*)(same_row ? p->value_at[r]
                                        : (const typename P::Elem*)w->values + row_start(w, below));
    p->next_mask[r] = w->bitmask + (same_row ? (p->row + r) * mask_pitch(w) + column / 8
                                             : below * mask_pitch(w));
  }
}

template <class P, bool Sparse> void run_panel(Panel<P>* p) {
  typedef typename P::Elem Elem;
  const Weight* w = p->a->weight;
  const int64_t columns = w->in_features, full = columns / P::kCols * P::kCols;
  p->next_lines = 0;
  for (int64_t r = 0; r < p->rows; ++r) {
    const int64_t o = p->row + r;
    p->value_at[r] = (const Elem*)w->values + (Sparse ? row_start(w, o) : o * columns + full);
    for (int64_t b = 0; b < p->inputs; ++b) p->totals[b][r] = P::zero();
  }
  for (int64_t start = 0; start < full; start += kSumColumns) {
    const int64_t count = full - start < kSumColumns ? full - start : kSumColumns;
    if (Sparse) {
      expand_panel(p, start, count);
      look_ahead(p, start + count);
      multiply_panel(p, p->weights, kSumColumns, P::kExpandInputs, start, count);
    } else {
      multiply_panel(p, (const Elem*)w->values + p->row * columns + start, columns, 0, start,
                     count);
    }
  }
  if (full < columns) {
    p->next_lines = 0;
    expand_tails<P, Sparse>(p, full);
    multiply_panel(p, p->weights, kSumColumns, 0, full, P::kCols);
  }
  finish_panel(p);
}

template <class P, bool Sparse> void multiply_wide(const LinearArgs* a) {
  Panel<P> panel;
  panel.a = a;
  // about equal shares of the inputs: each is then larger than a tile
  const int64_t shares = (a->batch + kPanelInputs - 1) / kPanelInputs;
  for (panel.row = a->begin; panel.row < a->end; panel.row += kPanelRows) {
    panel.rows = a->end - panel.row < kPanelRows ? a->end - panel.row : kPanelRows;
    for (int64_t share = 0; share < shares; ++share) {
      panel.first = a->batch * share / shares;
      panel.inputs = a->batch * (share + 1) / shares - panel.first;
      run_panel<P, Sparse>(&panel);
    }
  }
}

template <class P, bool Sparse> void multiply(const LinearArgs* a) {
  if (a->batch <= kNarrowBatch) multiply_narrow<P, Sparse>(a);
  else multiply_wide<P, Sparse>(a);
}

template <class P> void unpack(const Weight* w, void* out, int64_t begin, int64_t end) {
  typedef typename P::Elem Elem;
  typedef typename MaskWord<P::kCols>::type Mask;
  const int64_t columns = w->in_features, full = columns / P::kCols * P::kCols;
  for (int64_t row = begin; row < end; ++row) {
    const Elem* values = (const Elem*)w->values + row_start(w, row);
    const uint8_t* mask_at = w->bitmask + row * mask_pitch(w);
    Elem* y = (Elem*)out + (row - begin) * columns;
    const bool wide = may_overread<P>(w, row);
    for (int64_t c = 0; c < full; c += P::kCols) {
      const Mask mask = load_word<Mask>(mask_at + c / 8);
      P::store(wide ? P::expand(mask, values) : P::expand_exact(mask, values), y + c);
      values += __builtin_popcountll(mask);
    }
    if (full < columns) {
      const Mask mask = (Mask)tail_word(mask_at + full / 8, columns - full);
      Elem tail[P::kCols];
      P::store(P::expand_exact(mask, values), tail);
      for (int64_t c = full; c < columns; ++c) y[c] = tail[c - full];
    }
  }
}

// Scalar conversions: bit-exact and the same on every machine.
INLINE float bf16_to_float(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float value;
  __builtin_memcpy(&value, &wide, 4);
  return value;
}

// Round to nearest even; a NaN stays a NaN.
INLINE uint16_t float_to_bf16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class A, class B> struct Same {
  enum { value = 0 };
};
template <class A> struct Same<A, A> {
  enum { value = 1 };
};

template <class P> void prepare(const void* x, int64_t columns, void* prepared) {
  typedef typename P::Elem Elem;
  typedef typename P::X X;
  const Elem* in = (const Elem*)x;
  X* out = (X*)prepared;
  for (int64_t c = 0; c < columns; ++c) {
    if constexpr (Same<X, Elem>::value) {
      out[P::place(c)] = in[c];
    } else {
      out[P::place(c)] = P::to_float(in[c]);
    }
  }
  for (int64_t c = columns; c % kPad; ++c) out[P::place(c)] = 0;
}

template <class P> constexpr LinearKernel linear_kernel() {
  return LinearKernel{sizeof(typename P::X), Same<typename P::X, typename P::Elem>::value,
                      prepare<P>,            multiply<P, true>,
                      multiply<P, false>,    unpack<P>};
}

}  // namespace
