// The loops of decode.h, written once with the compiler's vectors of 16 floats and compiled for
// every instruction set. Internal linkage, nothing from the C++ library: see rows.h.
//
// Sums are float32; their order does not depend on threads or on the other sequences.
#pragma once

#include "decode.h"
#include "rows.h"

namespace {

typedef float Floats __attribute__((vector_size(4 * kKeyLanes), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(4 * kKeyLanes), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * kKeyLanes), aligned(2)));

// Sixteen stored elements as floats.
template <class P> struct Lanes {
  static INLINE Floats load(const typename P::Elem* p) {
    Floats out;
    for (int lane = 0; lane < kKeyLanes; ++lane) out[lane] = P::to_float(p[lane]);
    return out;
  }
};

INLINE Floats widen_bf16(const uint16_t* p) {
  Halves halves;
  __builtin_memcpy(&halves, p, sizeof halves);
  const Words words = __builtin_convertvector(halves, Words) << 16;
  return (Floats)words;
}

INLINE Floats splat(float value) { return (Floats){} + value; }

// e^x, relative error below 1e-7 where the result is a normal number: Cephes' polynomial. Below
// -87 it is about 1e-38, above 88 about 1e38; NaN stays NaN.
INLINE float exp_of(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const float n = shifted - 12582912.0f;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  __builtin_memcpy(&bits, &shifted, 4);
  bits = (bits << 23) + (127u << 23);
  float power;
  __builtin_memcpy(&power, &bits, 4);
  return p * power;
}

template <class P> void rms_norm(const NormArgs* a, int64_t begin, int64_t end) {
  typedef typename P::Elem Elem;
  const Elem* weight = (const Elem*)a->weight;
  for (int64_t row = begin; row < end; ++row) {
    const Elem* x = (const Elem*)a->x + row * a->width;
    Elem* y = (Elem*)a->y + row * a->width;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < a->width; ++i) {
      const float value = P::to_float(x[i]);
      sum += value * value;
    }
    const float scale = 1.0f / __builtin_sqrtf(sum / (float)a->width + a->eps);
#pragma omp simd
    for (int64_t i = 0; i < a->width; ++i)
      y[i] = P::from_float(P::to_float(x[i]) * scale * P::to_float(weight[i]));
  }
}

template <class P> void silu_mul(const GateArgs* a, int64_t begin, int64_t end) {
  typedef typename P::Elem Elem;
  const Elem* gate = (const Elem*)a->gate;
  const Elem* up = (const Elem*)a->up;
  Elem* y = (Elem*)a->y;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float g = P::to_float(gate[i]);
    y[i] = P::from_float(g / (1.0f + exp_of(-g)) * P::to_float(up[i]));
  }
}

// The pair (i, i + R/2) turns by the angle of its position (the halves convention of Llama).
INLINE float rotated(const float* cosine, const float* sine, int64_t half, int64_t d, float own,
                     float other) {
  return own * cosine[d] + (d < half ? -other : other) * sine[d];
}

template <class P> void rotate(const RotateArgs* a, int64_t begin, int64_t end) {
  typedef typename P::Elem Elem;
  const int64_t D = a->head_size, half = a->rotary / 2;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / a->tokens, t = item % a->tokens;
    const float* cosine = a->cosine + t * a->rotary;
    const float* sine = a->sine + t * a->rotary;
    for (int64_t h = 0; h < a->heads; ++h) {
      const Elem* x = (const Elem*)a->x + item * a->pitch + h * D;
      Elem* y = (Elem*)a->y + ((b * a->heads + h) * a->tokens + t) * D;
#pragma omp simd
      for (int64_t d = 0; d < half; ++d)
        y[d] = P::from_float(P::to_float(x[d]) * cosine[d] - P::to_float(x[d + half]) * sine[d]);
#pragma omp simd
      for (int64_t d = half; d < a->rotary; ++d)
        y[d] = P::from_float(P::to_float(x[d]) * cosine[d] + P::to_float(x[d - half]) * sine[d]);
      for (int64_t d = a->rotary; d < D; ++d) y[d] = x[d];
    }
  }
}

// Short runs of tokens are summed in float, runs in double: ranks of scores hang on the last digits.
template <class P> void add_squares(const SquareArgs* a, int64_t begin, int64_t end) {
  constexpr int64_t kRun = 64, kColumns = 256;
  for (int64_t first = begin; first < end; first += kColumns) {
    const int64_t columns = end - first < kColumns ? end - first : kColumns;
    for (int64_t start = 0; start < a->tokens; start += kRun) {
      const int64_t stop = start + kRun < a->tokens ? start + kRun : a->tokens;
      float sums[kColumns] = {};
      for (int64_t t = start; t < stop; ++t) {
        const typename P::Elem* x = (const typename P::Elem*)a->x + t * a->width + first;
#pragma omp simd
        for (int64_t c = 0; c < columns; ++c) {
          const float value = P::to_float(x[c]);
          sums[c] += value * value;
        }
      }
      for (int64_t c = 0; c < columns; ++c) a->sum[first + c] += (double)sums[c];
    }
  }
}

template <class P> void store_heads(const AttentionStep* a, int64_t begin, int64_t end) {
  typedef typename P::Elem Elem;
  const int64_t D = a->head_size, K = a->kv_heads, per = a->heads + 2 * K, half = a->rotary / 2;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / per, h = item % per, position = a->positions[b];
    if (position < 0) continue;
    const float* cosine = a->cosine + position * a->rotary;
    const float* sine = a->sine + position * a->rotary;
    if (h < a->heads) {
      Elem* q = (Elem*)a->q + (b * a->heads + h) * D;
      for (int64_t d = 0; d < half; ++d) {
        const float low = P::to_float(q[d]), high = P::to_float(q[d + half]);
        q[d] = P::from_float(rotated(cosine, sine, half, d, low, high));
        q[d + half] = P::from_float(rotated(cosine, sine, half, d + half, high, low));
      }
      continue;
    }
    const int64_t kv = (h - a->heads) % K, row = cache_row(a, b, kv, position);
    if (h < a->heads + K) {
      const Elem* k = (const Elem*)a->k + (b * K + kv) * D;
      Elem* out = (Elem*)a->keys + row / kKeyLanes * kKeyLanes * D + row % kKeyLanes;
      for (int64_t d = 0; d < D; ++d) {
        const int64_t other = d < half ? d + half : d - half;
        out[d * kKeyLanes] =
            d < a->rotary ? P::from_float(rotated(cosine, sine, half, d, P::to_float(k[d]),
                                                  P::to_float(k[other])))
                          : k[d];
      }
    } else {
      const Elem* v = (const Elem*)a->v + (b * K + kv) * D;
      Elem* out = (Elem*)a->values + row * round_to_lanes(D);
      for (int64_t d = 0; d < D; ++d) out[d] = v[d];
    }
  }
}

// Keys of one pass: their scores and the softmax so far stay in the first cache.
constexpr int64_t kPassKeys = 256, kMostHead = 256;

// State of G query heads of one group while they pass over the keys.
template <int G> struct Softmax {
  float q[G][kMostHead];
  Floats scores[G][kPassKeys / kKeyLanes];
  Floats out[G][kMostHead / kKeyLanes];
  float most[G], sum[G];
};

// Scores of groups of 16 keys, from group `first` of the pass. Two running sums for each head,
// whatever G is: the order of addition must not depend on how heads are dealt out to threads.
template <class P, int G>
INLINE void score_keys(Softmax<G>* s, const typename P::Elem* keys, int64_t D, int64_t first,
                       int64_t groups, float scale) {
  constexpr int kSums = 2;
  for (int64_t group = first; group < first + groups; ++group, keys += D * kKeyLanes) {
    Floats sums[G][kSums];
    UNROLL for (int g = 0; g < G; ++g) UNROLL for (int i = 0; i < kSums; ++i) sums[g][i] = splat(0);
    int64_t d = 0;
    for (; d + kSums <= D; d += kSums) {
      UNROLL for (int i = 0; i < kSums; ++i) {
        const Floats key = Lanes<P>::load(keys + (d + i) * kKeyLanes);
        UNROLL for (int g = 0; g < G; ++g) sums[g][i] += s->q[g][d + i] * key;
      }
    }
    for (; d < D; ++d) {
      const Floats key = Lanes<P>::load(keys + d * kKeyLanes);
      UNROLL for (int g = 0; g < G; ++g) sums[g][0] += s->q[g][d] * key;
    }
    UNROLL for (int g = 0; g < G; ++g) {
      UNROLL for (int i = 1; i < kSums; ++i) sums[g][0] += sums[g][i];
      s->scores[g][group] = sums[g][0] * scale;
    }
  }
}

// Scores [first, stop) of a pass become weights, the rest zeros; what was summed before shrinks to
// the new maximum.
template <int G> INLINE void soften(Softmax<G>* s, int64_t first, int64_t stop, int64_t D) {
  for (int g = 0; g < G; ++g) {
    float* score = (float*)s->scores[g];
    float most = s->most[g];
#pragma omp simd reduction(max : most)
    for (int64_t j = first; j < stop; ++j) most = score[j] > most ? score[j] : most;
    const float shrink = exp_of(s->most[g] - most);
    float sum = 0;
    for (int64_t j = 0; j < first; ++j) score[j] = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = first; j < stop; ++j) {
      score[j] = exp_of(score[j] - most);
      sum += score[j];
    }
    for (int64_t block = 0; block < round_to_lanes(D) / kKeyLanes; ++block)
      s->out[g][block] *= shrink;
    s->sum[g] = s->sum[g] * shrink + sum;
    s->most[g] = most;
  }
}

// out += weights [first, stop) of the pass . values, `Wide` blocks of 16 columns at once; `values`
// are those of weight `first`.
template <class P, int G, int Wide>
INLINE void add_columns(Softmax<G>* s, const typename P::Elem* values, int64_t pitch,
                        int64_t block, int64_t first, int64_t stop) {
  Floats sums[G][Wide];
  UNROLL for (int g = 0; g < G; ++g)
    UNROLL for (int w = 0; w < Wide; ++w) sums[g][w] = s->out[g][block + w];
  values += block * kKeyLanes;
  for (int64_t j = first; j < stop; ++j) {
    UNROLL for (int w = 0; w < Wide; ++w) {
      const Floats value = Lanes<P>::load(values + (j - first) * pitch + w * kKeyLanes);
      UNROLL for (int g = 0; g < G; ++g) sums[g][w] += ((const float*)s->scores[g])[j] * value;
    }
  }
  UNROLL for (int g = 0; g < G; ++g)
    UNROLL for (int w = 0; w < Wide; ++w) s->out[g][block + w] = sums[g][w];
}

template <class P, int G>
INLINE void add_values(Softmax<G>* s, const typename P::Elem* values, int64_t pitch, int64_t first,
                       int64_t stop) {
  constexpr int kWide = G >= 4 ? 1 : 4 / G;
  const int64_t blocks = pitch / kKeyLanes;
  int64_t block = 0;
  for (; block + kWide <= blocks; block += kWide)
    add_columns<P, G, kWide>(s, values, pitch, block, first, stop);
  for (; block < blocks; ++block) add_columns<P, G, 1>(s, values, pitch, block, first, stop);
}

// Tokens of a row's sequence that lie behind each other in the cache.
struct Stretch {
  int64_t row, tokens;
};

INLINE Stretch stretch_from(const AttentionStep* a, int64_t b, int64_t kv, int64_t token,
                            int64_t most) {
  const int64_t on_page = a->page_size - token % a->page_size;
  return Stretch{cache_row(a, b, kv, token), most < on_page ? most : on_page};
}

// Query heads head .. head + G - 1 of row b, all in one group. Passes begin at fixed positions and
// sums run from key to key, so that the pages do not change a bit.
template <class P, int G> void attend_heads(const AttentionStep* a, int64_t b, int64_t head) {
  typedef typename P::Elem Elem;
  const int64_t D = a->head_size, pitch = round_to_lanes(D), position = a->positions[b];
  const int64_t kv = head / (a->heads / a->kv_heads);
  Softmax<G> s;
  for (int g = 0; g < G; ++g) {
    const Elem* q = (const Elem*)a->q + (b * a->heads + head + g) * D;
    for (int64_t d = 0; d < D; ++d) s.q[g][d] = P::to_float(q[d]);
    for (int64_t block = 0; block < pitch / kKeyLanes; ++block) s.out[g][block] = splat(0);
    s.most[g] = -__builtin_inff();
    s.sum[g] = 0;
  }
  const int64_t seen = a->window > 0 && position >= a->window ? position - a->window + 1 : 0;
  const int64_t stop = position + 1;
  for (int64_t key = seen / kKeyLanes * kKeyLanes; key < stop; key += kPassKeys) {
    const int64_t left = stop - key < kPassKeys ? stop - key : kPassKeys;
    const int64_t first = seen > key ? seen - key : 0;
    for (int64_t at = 0; at < left;) {
      const Stretch part = stretch_from(a, b, kv, key + at, left - at);
      score_keys<P, G>(&s, (const Elem*)a->keys + part.row * D, D, at / kKeyLanes,
                       (part.tokens + kKeyLanes - 1) / kKeyLanes, a->scale);
      at += part.tokens;
    }
    soften<G>(&s, first, left, D);
    for (int64_t at = first; at < left;) {
      const Stretch part = stretch_from(a, b, kv, key + at, left - at);
      add_values<P, G>(&s, (const Elem*)a->values + part.row * pitch, pitch, at, at + part.tokens);
      at += part.tokens;
    }
  }
  for (int g = 0; g < G; ++g) {
    Elem* out = (Elem*)a->out + (b * a->heads + head + g) * D;
    const float* sums = (const float*)s.out[g];
    for (int64_t d = 0; d < D; ++d) out[d] = P::from_float(sums[d] / s.sum[g]);
  }
}

template <class P> void attend(const AttentionStep* a, int64_t begin, int64_t end) {
  const int64_t group = a->heads / a->kv_heads;
  for (int64_t item = begin; item < end;) {
    const int64_t b = item / a->heads, head = item % a->heads;
    const int64_t in_group = group - head % group;
    const int64_t left = end - item < in_group ? end - item : in_group;
    if (a->positions[b] < 0) {
      typename P::Elem* out = (typename P::Elem*)a->out + item * a->head_size;
      for (int64_t d = 0; d < a->head_size; ++d) out[d] = 0;
      item += 1;
    } else if (left >= 8 && P::kAttendHeads >= 8) {
      attend_heads<P, 8>(a, b, head), item += 8;
    } else if (left >= 4) {
      attend_heads<P, 4>(a, b, head), item += 4;
    } else if (left >= 2) {
      attend_heads<P, 2>(a, b, head), item += 2;
    } else {
      attend_heads<P, 1>(a, b, head), item += 1;
    }
  }
}

template <class P> constexpr DecodeKernel decode_kernel() {
  return DecodeKernel{rms_norm<P>,    silu_mul<P>,    rotate<P>,
                      add_squares<P>, store_heads<P>, attend<P>};
}

// What decode_kernel needs of a dtype: conversions of one element, and how many query heads share
// a read of the cache (as many as the registers hold).
template <class Stored, float (*Load)(Stored), Stored (*Store)(float), int Heads> struct Scalars {
  typedef Stored Elem;
  enum { kAttendHeads = Heads };
  static INLINE float to_float(Elem value) { return Load(value); }
  static INLINE Elem from_float(float value) { return Store(value); }
};

INLINE float same_float(float value) { return value; }

template <int Heads> using DecodeBF16 = Scalars<uint16_t, bf16_to_float, float_to_bf16, Heads>;
template <int Heads> using DecodeF32 = Scalars<float, same_float, same_float, Heads>;

template <int Heads> struct Lanes<DecodeBF16<Heads>> {
  static INLINE Floats load(const uint16_t* p) { return widen_bf16(p); }
};
template <int Heads> struct Lanes<DecodeF32<Heads>> {
  static INLINE Floats load(const float* p) {
    Floats out;
    __builtin_memcpy(&out, p, sizeof out);
    return out;
  }
};

}  // namespace
