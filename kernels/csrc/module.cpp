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
#include "threads.h"

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

}  // namespace

NB_MODULE(_C, module) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  module.def("isa_names", &isa_names, "Instruction sets this machine runs, fastest first.");
  module.def("thread_pool_name", &thread_pool_name, "\"openmp\" (torch's own threads) or \"own\".");
  module.def("check", &check, nb::arg("bitmask"), nb::arg("offsets"), nb::arg("offset_bytes"),
             nb::arg("out_features"), nb::arg("in_features"), nb::arg("nnz"), Unlocked(),
             "(fault, row, expected, found) of the first fault; fault is empty without one.");
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
  module.def("read_all", &read_buffer, nb::arg("data"), nb::arg("bytes"), nb::arg("threads"),
             Unlocked(), "The sum of a buffer's 64-bit words; for measuring read bandwidth.");
  module.def("use_huge_pages", &huge_pages, nb::arg("data"), nb::arg("bytes"), Unlocked(),
             "Move a buffer to huge pages where the system can; content and address stay.");
}
