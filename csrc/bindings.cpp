// Python bindings: addresses, sizes and dtype codes in, nothing of any tensor library. The caller keeps the memory
// alive; the interpreter lock is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "instruction_set.h"
#include "noising.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

crd::Dtype dtype_from_code(const char* name, int code) {
  if (code < 0 || code > 2) {
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(code) +
                                "; expected 0 (float32), 1 (bfloat16) or 2 (float16)");
  }
  return static_cast<crd::Dtype>(code);
}

void require_at_least(const char* name, int64_t value, int64_t least) {
  if (value < least) {
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + "; expected at least " +
                                std::to_string(least));
  }
}

void require_address(const char* name, Address address) {
  if (address == 0) throw std::invalid_argument(std::string(name) + " is null; expected the address of its data");
}

// Rows that overlap would be written by several threads at once.
void require_row_stride(const char* name, int64_t stride, int64_t batch, int64_t dim, bool written) {
  require_at_least(name, stride, 0);
  if (written && batch > 1 && stride < dim) {
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(stride) + "; expected at least dim = " +
                                std::to_string(dim) + ", or rows overlap");
  }
}

void noise(Address x0_ptr, int x0_dtype, int64_t x0_row_stride, Address out_ptr, int out_dtype, int64_t out_row_stride,
           Address sigma_ptr, Address sample_ids_ptr, int64_t batch, int64_t dim, uint64_t seed, int32_t stream,
           int64_t threads) {
  require_at_least("batch", batch, 0);
  require_at_least("dim", dim, 0);
  require_at_least("threads", threads, 1);
  const crd::Dtype x0_type = dtype_from_code("x0_dtype", x0_dtype);
  const crd::Dtype out_type = dtype_from_code("out_dtype", out_dtype);
  require_row_stride("x0_row_stride", x0_row_stride, batch, dim, false);
  require_row_stride("out_row_stride", out_row_stride, batch, dim, true);
  if (batch == 0 || dim == 0) return;
  require_address("x0_ptr", x0_ptr);
  require_address("out_ptr", out_ptr);
  require_address("sigma_ptr", sigma_ptr);
  require_address("sample_ids_ptr", sample_ids_ptr);
  py::gil_scoped_release unlocked;
  crd::run_noising({reinterpret_cast<const void*>(x0_ptr), x0_type, x0_row_stride, reinterpret_cast<void*>(out_ptr),
                    out_type, out_row_stride, reinterpret_cast<const float*>(sigma_ptr),
                    reinterpret_cast<const int64_t*>(sample_ids_ptr), batch, dim, seed, stream},
                   threads);
}

void epsilon(Address out_ptr, int out_dtype, int64_t out_row_stride, Address sample_ids_ptr, int64_t batch, int64_t dim,
             uint64_t seed, int32_t stream, int64_t threads) {
  require_at_least("batch", batch, 0);
  require_at_least("dim", dim, 0);
  require_at_least("threads", threads, 1);
  const crd::Dtype out_type = dtype_from_code("out_dtype", out_dtype);
  require_row_stride("out_row_stride", out_row_stride, batch, dim, true);
  if (batch == 0 || dim == 0) return;
  require_address("out_ptr", out_ptr);
  require_address("sample_ids_ptr", sample_ids_ptr);
  py::gil_scoped_release unlocked;
  crd::run_noising({nullptr, out_type, 0, reinterpret_cast<void*>(out_ptr), out_type, out_row_stride, nullptr,
                    reinterpret_cast<const int64_t*>(sample_ids_ptr), batch, dim, seed, stream},
                   threads);
}

py::tuple philox4x32(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
  const crd::PhiloxBlock block =
      crd::philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return py::make_tuple(block.word[0], block.word[1], block.word[2], block.word[3]);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of crd_fast: addresses, sizes and dtype codes (0 float32, 1 bfloat16, 2 float16) in.";
  m.def("noise", &noise, "x_t = (1 - sigma) x0 + sigma epsilon in fp32, rounded to the output dtype.",
        py::arg("x0_ptr"), py::arg("x0_dtype"), py::arg("x0_row_stride"), py::arg("out_ptr"), py::arg("out_dtype"),
        py::arg("out_row_stride"), py::arg("sigma_ptr"), py::arg("sample_ids_ptr"), py::arg("batch"), py::arg("dim"),
        py::arg("seed"), py::arg("stream"), py::arg("threads"));
  m.def("epsilon", &epsilon, "The standard normals that noise() adds.", py::arg("out_ptr"), py::arg("out_dtype"),
        py::arg("out_row_stride"), py::arg("sample_ids_ptr"), py::arg("batch"), py::arg("dim"), py::arg("seed"),
        py::arg("stream"), py::arg("threads"));
  m.def("philox4x32", &philox4x32, "One Philox4x32-10 block: 4 words from a counter of 4 words and a key of 2.",
        py::arg("counter"), py::arg("key"));
  m.def(
      "instruction_set", [] { return crd::name_of(crd::instruction_set()); },
      "The instruction set the kernels run with: portable, avx2 or avx512.");
}
