// The Python module `prune_llm_kernels._C`. Pointers arrive as integers: the extension knows no
// torch, so one build serves every torch version. Callers have checked every tensor.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>
#include <vector>

#include "linear.h"
#include "pack_channels.h"
#include "plan.h"
#include "select.h"
#include "threads.h"
#include "tokens_calls.h"

namespace nb = nanobind;

namespace {

struct Isas {
  const Isa* table[kMaxIsas] = {};
  const int count = supported_isas(table);
};

const Isas& isas() {
  static const Isas found{};
  return found;
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (int i = 0; i < isas().count; ++i) names.emplace_back(isas().table[i]->name);
  return names;
}

const Isa& isa_at(int index) {
  if (index < 0 || index >= isas().count) throw nb::index_error("isa: no such instruction set");
  return *isas().table[index];
}

DType dtype_at(int index) {
  if (index < 0 || index >= kDTypes) throw nb::index_error("dtype: no such dtype");
  return static_cast<DType>(index);
}

template <class T> const T* at(uintptr_t address) { return reinterpret_cast<const T*>(address); }

Weight weight_at(uintptr_t bitmask, uintptr_t values, uintptr_t offsets, int64_t offset_bytes,
                 int64_t out_features, int64_t in_features, int64_t nnz) {
  return {at<uint8_t>(bitmask),
          at<void>(values),
          at<void>(offsets),
          offset_bytes,
          out_features,
          in_features,
          nnz,
          out_features ? nnz / out_features : 0};
}

const char* fault_name(Fault fault) {
  switch (fault) {
    case Fault::none: return "";
    case Fault::offsets_start: return "offsets_start";
    case Fault::offsets_order: return "offsets_order";
    case Fault::offsets_end: return "offsets_end";
    case Fault::row_count: return "row_count";
    case Fault::padding: return "padding";
  }
  return "unknown";
}

std::tuple<std::string, int64_t, int64_t, int64_t> check(uintptr_t bitmask, uintptr_t offsets,
                                                         int64_t offset_bytes,
                                                         int64_t out_features,
                                                         int64_t in_features, int64_t nnz) {
  const Check result =
      check_weight(weight_at(bitmask, 0, offsets, offset_bytes, out_features, in_features, nnz));
  return {fault_name(result.fault), result.row, result.expected, result.found};
}

void linear(int isa, int dtype, int threads, uintptr_t x, int64_t batch, uintptr_t bitmask,
            uintptr_t values, uintptr_t offsets, int64_t offset_bytes, int64_t out_features,
            int64_t in_features, int64_t nnz, uintptr_t bias, uintptr_t y) {
  const Weight weight =
      weight_at(bitmask, values, offsets, offset_bytes, out_features, in_features, nnz);
  run_linear(isa_at(isa), dtype_at(dtype), threads, weight, at<void>(x), batch, at<void>(bias),
             reinterpret_cast<void*>(y));
}

void unpack(int isa, int dtype, int threads, uintptr_t bitmask, uintptr_t values,
            uintptr_t offsets, int64_t offset_bytes, int64_t out_features, int64_t in_features,
            int64_t nnz, uintptr_t out, int64_t begin, int64_t end) {
  const Weight weight =
      weight_at(bitmask, values, offsets, offset_bytes, out_features, in_features, nnz);
  run_unpack(isa_at(isa), dtype_at(dtype), threads, weight, reinterpret_cast<void*>(out), begin,
             end);
}

uint64_t read_buffer(uintptr_t data, int64_t bytes, int threads) {
  return read_all(at<void>(data), bytes, threads);
}

void huge_pages(uintptr_t data, int64_t bytes) { use_huge_pages(at<void>(data), bytes); }

bool has_gram(int isa) { return isa_at(isa).gram; }
bool has_attention(int isa) { return isa_at(isa).attention; }

void gram_add(int isa, int threads, uintptr_t x, int64_t tokens, int64_t width, uintptr_t packed,
              uintptr_t sum) {
  const Factor factor = {at<uint16_t>(x), width, reinterpret_cast<uint32_t*>(packed)};
  run_gram(*isa_at(isa).gram(), threads,
           {factor, factor, tokens, reinterpret_cast<float*>(sum), true});
}

void cross_add(int isa, int threads, uintptr_t a, uintptr_t b, int64_t tokens, int64_t height,
               int64_t width, uintptr_t packed_a, uintptr_t packed_b, uintptr_t sum) {
  const Factor left = {at<uint16_t>(a), height, reinterpret_cast<uint32_t*>(packed_a)};
  const Factor right = {at<uint16_t>(b), width, reinterpret_cast<uint32_t*>(packed_b)};
  run_gram(*isa_at(isa).gram(), threads,
           {left, right, tokens, reinterpret_cast<float*>(sum), false});
}

int64_t attention_scratch(int isa, int64_t tokens, int64_t head_size) {
  return isa_at(isa).attention()->scratch_bytes(tokens, head_size);
}

// One of q, k, v, out: its address and its strides over samples, heads and tokens, in elements.
using Strided = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

void causal_attention(int isa, int threads, const Strided& q, const Strided& k, const Strided& v,
                      const Strided& out, int64_t batch, int64_t heads, int64_t kv_heads,
                      int64_t tokens, int64_t head_size, float scale, uintptr_t scratch) {
  const auto [q_at, q_batch, q_head, q_pitch] = q;
  const auto [k_at, k_batch, k_head, k_pitch] = k;
  const auto [v_at, v_batch, v_head, v_pitch] = v;
  const auto [out_at, out_batch, out_head, out_pitch] = out;
  const AttentionArgs head = {at<uint16_t>(q_at), at<uint16_t>(k_at), at<uint16_t>(v_at),
                              reinterpret_cast<uint16_t*>(out_at), q_pitch, k_pitch, v_pitch,
                              out_pitch, tokens, head_size, scale};
  run_attention(*isa_at(isa).attention(), threads,
                {head, batch, heads, kv_heads, q_batch, q_head, k_batch, k_head, v_batch, v_head,
                 out_batch, out_head, reinterpret_cast<void*>(scratch)});
}

const DecodeKernel& decode_at(int isa, int dtype) { return isa_at(isa).decode[dtype_at(dtype)]; }

void rms_norm(int isa, int dtype, int threads, uintptr_t x, uintptr_t weight, uintptr_t y,
              int64_t rows, int64_t width, float eps) {
  run_rms_norm(decode_at(isa, dtype), threads,
               {at<void>(x), at<void>(weight), reinterpret_cast<void*>(y), rows, width, eps});
}

void silu_mul(int isa, int dtype, int threads, uintptr_t gate, uintptr_t up, uintptr_t y,
              int64_t count) {
  run_silu_mul(decode_at(isa, dtype), threads,
               {at<void>(gate), at<void>(up), reinterpret_cast<void*>(y), count});
}

void rotate(int isa, int dtype, int threads, uintptr_t x, uintptr_t y, uintptr_t cosine,
            uintptr_t sine, int64_t batch, int64_t tokens, int64_t heads, int64_t head_size,
            int64_t rotary, int64_t pitch) {
  run_rotate(decode_at(isa, dtype), threads,
             {at<void>(x), reinterpret_cast<void*>(y), at<float>(cosine), at<float>(sine), batch,
              tokens, heads, head_size, rotary, pitch});
}

void add_squares(int isa, int dtype, int threads, uintptr_t x, uintptr_t sum, int64_t tokens,
                 int64_t width) {
  run_add_squares(decode_at(isa, dtype), threads,
                  {at<void>(x), reinterpret_cast<double*>(sum), tokens, width});
}

void mark_lowest(int threads, uintptr_t scores, int64_t rows, int64_t width, uintptr_t counts,
                 uintptr_t marked) {
  run_mark_lowest(threads, at<float>(scores), rows, width, at<int64_t>(counts),
                  reinterpret_cast<uint8_t*>(marked));
}

// bitmask, values, offsets, bytes of an offset, O, nnz, bias, y; bitmask 0 for a dense weight.
using PlanWeightTuple =
    std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t>;

void plan_linears(Plan& plan, uintptr_t x, int64_t batch, int64_t in_features,
                  const std::vector<PlanWeightTuple>& weights, bool accumulate) {
  std::vector<PlanWeight> list;
  for (const auto& [bitmask, values, offsets, offset_bytes, out_features, nnz, bias, y] : weights)
    list.push_back({weight_at(bitmask, values, offsets, offset_bytes, out_features, in_features,
                              nnz),
                    at<void>(bias), reinterpret_cast<void*>(y)});
  plan.add_linears(at<void>(x), batch, in_features, list, accumulate);
}

// data, starts, O, tile, pitch, bias, y; starts 0 for a dense weight.
using PlanChannelsTuple =
    std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t>;

void plan_channels(Plan& plan, uintptr_t x, int64_t batch, int64_t in_features, uintptr_t scales,
                   uintptr_t thresholds, uintptr_t site_counts,
                   const std::vector<PlanChannelsTuple>& weights, bool accumulate, bool gated) {
  std::vector<PlanChannels> list;
  for (const auto& [data, starts, out_features, tile, pitch, bias, y] : weights)
    list.push_back({{at<void>(data), at<uint32_t>(starts), out_features, in_features, tile, pitch},
                    at<void>(bias), reinterpret_cast<void*>(y)});
  plan.add_channels({at<void>(x), at<float>(scales), at<float>(thresholds), in_features, batch,
                     reinterpret_cast<int64_t*>(site_counts)},
                    list, accumulate, gated);
}

int64_t channels_measure(int threads, uintptr_t bitmask, uintptr_t offsets, int64_t offset_bytes,
                         int64_t out_features, int64_t in_features, int64_t nnz, int64_t tile,
                         int64_t elem_bytes, uintptr_t starts) {
  return measure_channels(
      weight_at(bitmask, 0, offsets, offset_bytes, out_features, in_features, nnz), tile,
      elem_bytes, threads, reinterpret_cast<uint32_t*>(starts));
}

void channels_fill(int threads, uintptr_t bitmask, uintptr_t values, uintptr_t offsets,
                   int64_t offset_bytes, int64_t out_features, int64_t in_features, int64_t nnz,
                   int64_t tile, int64_t elem_bytes, uintptr_t starts, uintptr_t data) {
  const Weight weight =
      weight_at(bitmask, values, offsets, offset_bytes, out_features, in_features, nnz);
  const ChannelWeight channels{nullptr, at<uint32_t>(starts), out_features, in_features, tile, 0};
  fill_channels(weight, channels, elem_bytes, threads, reinterpret_cast<void*>(data));
}

void channels_unpack(int isa, int dtype, uintptr_t data, uintptr_t starts, int64_t out_features,
                     int64_t in_features, int64_t tile, uintptr_t out, int64_t begin,
                     int64_t end) {
  const ChannelWeight weight{at<void>(data), at<uint32_t>(starts), out_features, in_features, tile,
                             0};
  isa_at(isa).channels[dtype_at(dtype)].unpack(&weight, reinterpret_cast<void*>(out), begin, end);
}

void plan_rms_norm(Plan& plan, uintptr_t x, uintptr_t weight, uintptr_t y, int64_t batch,
                   int64_t heads, int64_t width, float eps) {
  plan.add_rms_norm({at<void>(x), at<void>(weight), reinterpret_cast<void*>(y), batch * heads,
                     width, eps},
                    batch);
}

void plan_silu_mul(Plan& plan, uintptr_t gate, uintptr_t up, uintptr_t y, int64_t batch,
                   int64_t width) {
  plan.add_silu_mul({at<void>(gate), at<void>(up), reinterpret_cast<void*>(y), batch * width},
                    batch);
}

void plan_attention(Plan& plan, const std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>& heads,
                    const std::tuple<uintptr_t, uintptr_t>& angles,
                    const std::tuple<uintptr_t, uintptr_t>& cache,
                    const std::tuple<uintptr_t, uintptr_t>& where, int64_t batch,
                    int64_t head_count, int64_t kv_heads, int64_t head_size, int64_t rotary,
                    int64_t page_size, int64_t cache_pages, int64_t page_count, int64_t window,
                    float scale) {
  const auto [q, k, v, out] = heads;
  const auto [cosine, sine] = angles;
  const auto [keys, values] = cache;
  const auto [pages, positions] = where;
  plan.add_attention({reinterpret_cast<void*>(q), at<void>(k), at<void>(v), at<float>(cosine),
                      at<float>(sine), reinterpret_cast<void*>(keys),
                      reinterpret_cast<void*>(values), at<int64_t>(pages), at<int64_t>(positions),
                      reinterpret_cast<void*>(out), batch, head_count, kv_heads, head_size, rotary,
                      page_size, cache_pages, page_count, window, scale});
}

}  // namespace

NB_MODULE(_C, module) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  module.def("isa_names", &isa_names, "Instruction sets this machine runs, fastest first.");
  module.def("thread_pool_name", &thread_pool_name, "\"openmp\" (torch's own threads) or \"own\".");
  module.def("check", &check, nb::arg("bitmask"), nb::arg("offsets"), nb::arg("offset_bytes"),
             nb::arg("out_features"), nb::arg("in_features"), nb::arg("nnz"), Unlocked(),
             "(fault, row, expected, found) of the first fault; fault is empty without one.");
  module.def("has_slow_pairs", &has_slow_pairs,
             "Whether dot products of bfloat16 pairs are slower than float32's multiply-adds.");
  module.def("linear", &linear, nb::arg("isa"), nb::arg("dtype"), nb::arg("threads"), nb::arg("x"),
             nb::arg("batch"), nb::arg("bitmask"), nb::arg("values"), nb::arg("offsets"),
             nb::arg("offset_bytes"), nb::arg("out_features"), nb::arg("in_features"),
             nb::arg("nnz"), nb::arg("bias"), nb::arg("y"), Unlocked(),
             "y [batch, O] = x [batch, I] times a packed weight, or a dense one if bitmask is 0.");
  module.def("unpack", &unpack, nb::arg("isa"), nb::arg("dtype"), nb::arg("threads"),
             nb::arg("bitmask"), nb::arg("values"), nb::arg("offsets"), nb::arg("offset_bytes"),
             nb::arg("out_features"), nb::arg("in_features"), nb::arg("nnz"), nb::arg("out"),
             nb::arg("begin"), nb::arg("end"), Unlocked(),
             "Rows begin to end of a packed weight, dense, to out [end - begin, I].");
  module.def("has_gram", &has_gram, nb::arg("isa"),
             "Whether an instruction set has gram_add and cross_add.");
  module.def("has_attention", &has_attention, nb::arg("isa"),
             "Whether an instruction set has causal_attention.");
  module.def("gram_add", &gram_add, nb::arg("isa"), nb::arg("threads"), nb::arg("x"),
             nb::arg("tokens"), nb::arg("width"), nb::arg("packed"), nb::arg("sum"), Unlocked(),
             "sum [I, I] += x^T x on and below the diagonal, x [T, I] bfloat16.");
  module.def("cross_add", &cross_add, nb::arg("isa"), nb::arg("threads"), nb::arg("a"),
             nb::arg("b"), nb::arg("tokens"), nb::arg("height"), nb::arg("width"),
             nb::arg("packed_a"), nb::arg("packed_b"), nb::arg("sum"), Unlocked(),
             "sum [D, I] += a^T b, a [T, D] and b [T, I] bfloat16.");
  module.def("attention_scratch", &attention_scratch, nb::arg("isa"), nb::arg("tokens"),
             nb::arg("head_size"), "Bytes of scratch that causal_attention needs per thread.");
  module.def("causal_attention", &causal_attention, nb::arg("isa"), nb::arg("threads"),
             nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("out"), nb::arg("batch"),
             nb::arg("heads"), nb::arg("kv_heads"), nb::arg("tokens"), nb::arg("head_size"),
             nb::arg("scale"), nb::arg("scratch"), Unlocked(),
             "out = softmax(scale q k^T, causal) v over bfloat16 heads.");
  module.def("rms_norm", &rms_norm, nb::arg("isa"), nb::arg("dtype"), nb::arg("threads"),
             nb::arg("x"), nb::arg("weight"), nb::arg("y"), nb::arg("rows"), nb::arg("width"),
             nb::arg("eps"), Unlocked(), "y = x / sqrt(mean(x^2) + eps) * weight, row by row.");
  module.def("silu_mul", &silu_mul, nb::arg("isa"), nb::arg("dtype"), nb::arg("threads"),
             nb::arg("gate"), nb::arg("up"), nb::arg("y"), nb::arg("count"), Unlocked(),
             "y = gate / (1 + e^-gate) * up.");
  module.def("rotate", &rotate, nb::arg("isa"), nb::arg("dtype"), nb::arg("threads"), nb::arg("x"),
             nb::arg("y"), nb::arg("cosine"), nb::arg("sine"), nb::arg("batch"),
             nb::arg("tokens"), nb::arg("heads"), nb::arg("head_size"), nb::arg("rotary"),
             nb::arg("pitch"), Unlocked(), "x [B, N, H, D] -> y [B, H, N, D], rotated.");
  module.def("add_squares", &add_squares, nb::arg("isa"), nb::arg("dtype"), nb::arg("threads"),
             nb::arg("x"), nb::arg("sum"), nb::arg("tokens"), nb::arg("width"), Unlocked(),
             "sum [I] += the squares of x [T, I], token by token.");
  module.def("mark_lowest", &mark_lowest, nb::arg("threads"), nb::arg("scores"), nb::arg("rows"),
             nb::arg("width"), nb::arg("counts"), nb::arg("marked"), Unlocked(),
             "marked [R, W]: the counts [R] lowest of the scores [R, W], the leftmost of equals.");
  nb::class_<Plan>(module, "Plan", "Operations over fixed buffers, replayed in one call.")
      .def("__init__",
           [](Plan* plan, int isa, int dtype) { new (plan) Plan(isa_at(isa), dtype_at(dtype)); },
           nb::arg("isa"), nb::arg("dtype"))
      .def("linears", &plan_linears, nb::arg("x"), nb::arg("batch"), nb::arg("in_features"),
           nb::arg("weights"), nb::arg("accumulate"))
      .def("channels", &plan_channels, nb::arg("x"), nb::arg("batch"), nb::arg("in_features"),
           nb::arg("scales"), nb::arg("thresholds"), nb::arg("counts"), nb::arg("weights"),
           nb::arg("accumulate"), nb::arg("gated"))
      .def("rms_norm", &plan_rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("y"),
           nb::arg("batch"), nb::arg("heads"), nb::arg("width"), nb::arg("eps"))
      .def("silu_mul", &plan_silu_mul, nb::arg("gate"), nb::arg("up"), nb::arg("y"),
           nb::arg("batch"), nb::arg("width"))
      .def("attention", &plan_attention, nb::arg("heads"), nb::arg("angles"), nb::arg("cache"),
           nb::arg("where"), nb::arg("batch"), nb::arg("head_count"), nb::arg("kv_heads"),
           nb::arg("head_size"), nb::arg("rotary"), nb::arg("page_size"), nb::arg("cache_pages"),
           nb::arg("page_count"), nb::arg("window"), nb::arg("scale"))
      .def("run", &Plan::run, nb::arg("threads"), nb::arg("rows"), Unlocked(),
           "False, with nothing run, where a position or page is outside its cache.");
  module.def("channels_measure", &channels_measure, nb::arg("threads"), nb::arg("bitmask"),
             nb::arg("offsets"), nb::arg("offset_bytes"), nb::arg("out_features"),
             nb::arg("in_features"), nb::arg("nnz"), nb::arg("tile"), nb::arg("elem_bytes"),
             nb::arg("starts"), Unlocked(),
             "Fills starts [tiles * I + 1]; the elements of the channel-major form, -1: too many.");
  module.def("channels_fill", &channels_fill, nb::arg("threads"), nb::arg("bitmask"),
             nb::arg("values"), nb::arg("offsets"), nb::arg("offset_bytes"),
             nb::arg("out_features"), nb::arg("in_features"), nb::arg("nnz"), nb::arg("tile"),
             nb::arg("elem_bytes"), nb::arg("starts"), nb::arg("data"), Unlocked(),
             "The channel-major form of a packed weight.");
  module.def("channels_unpack", &channels_unpack, nb::arg("isa"), nb::arg("dtype"),
             nb::arg("data"), nb::arg("starts"), nb::arg("out_features"), nb::arg("in_features"),
             nb::arg("tile"), nb::arg("out"), nb::arg("begin"), nb::arg("end"), Unlocked(),
             "Outputs begin to end of one tile, dense, to out [I, end - begin].");
  module.def("read_all", &read_buffer, nb::arg("data"), nb::arg("bytes"), nb::arg("threads"),
             Unlocked(), "The sum of a buffer's 64-bit words; for measuring read bandwidth.");
  module.def("use_huge_pages", &huge_pages, nb::arg("data"), nb::arg("bytes"), Unlocked(),
             "Move a buffer to huge pages where the system can; content and address stay.");
}
