// Python bindings: addresses, sizes and dtype codes in, nothing of any tensor library. The caller keeps the memory
// alive; the interpreter lock is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "generator.h"
#include "instruction_set.h"
#include "noising.h"
#include "objective.h"
#include "parallel.h"
#include "residual.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

crd::Dtype dtype_from_code(const char* name, int code) {
  if (code < 0 || code > 3) {
    throw std::invalid_argument(std::string(name) + " has dtype code " + std::to_string(code) +
                                "; expected 0 (float32), 1 (bfloat16), 2 (float16) or 3 (bool)");
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

// A tensor as the Python side describes it: address, dtype code, elements between rows, and the sizes and strides of a
// row's axes.
using Tensor = std::tuple<Address, int, int64_t, std::vector<int64_t>, std::vector<int64_t>>;

crd::Rows rows_of(const char* name, const std::optional<Tensor>& tensor, int64_t dim) {
  crd::Rows rows;
  if (!tensor) return rows;
  const auto& [address, dtype, row_stride, sizes, strides] = *tensor;
  require_address(name, address);
  rows.data = reinterpret_cast<void*>(address);
  rows.dtype = dtype_from_code(name, dtype);
  rows.row_stride = row_stride;
  require_at_least(name, row_stride, 0);
  if (sizes.empty() || sizes.size() != strides.size() || sizes.size() > static_cast<size_t>(crd::kMaxRowAxes)) {
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(sizes.size()) + " sizes and " +
                                std::to_string(strides.size()) + " strides; expected as many of each, 1 to " +
                                std::to_string(crd::kMaxRowAxes));
  }
  int64_t elements = 1;
  rows.axes = static_cast<int>(sizes.size());
  for (size_t axis = 0; axis < sizes.size(); ++axis) {
    require_at_least(name, sizes[axis], 1);
    require_at_least(name, strides[axis], 0);
    rows.sizes[axis] = sizes[axis];
    rows.strides[axis] = strides[axis];
    elements *= sizes[axis];
  }
  if (elements != dim) {
    throw std::invalid_argument(std::string(name) + " has rows of " + std::to_string(elements) +
                                " elements; expected dim = " + std::to_string(dim));
  }
  return rows;
}

// Elements that overlap would be written twice, by several threads at once. They do not when, from the smallest stride
// up, every axis steps over all that lies below it; the batch may be any of the axes.
crd::Rows written_rows(const char* name, const Tensor& tensor, int64_t batch, int64_t dim) {
  const crd::Rows rows = rows_of(name, tensor, dim);
  if (rows.dtype == crd::Dtype::kMask) throw std::invalid_argument(std::string(name) + " is a mask; expected floats");
  std::vector<std::pair<int64_t, int64_t>> axes;  // stride, size
  if (batch > 1) axes.emplace_back(rows.row_stride, batch);
  for (int axis = 0; axis < rows.axes; ++axis) {
    if (rows.sizes[axis] > 1) axes.emplace_back(rows.strides[axis], rows.sizes[axis]);
  }
  std::sort(axes.begin(), axes.end());
  int64_t below = 0;  // the farthest element reached without the axis at hand
  for (const auto& [stride, size] : axes) {
    if (stride <= below) {
      throw std::invalid_argument(std::string(name) + " has a stride of " + std::to_string(stride) + " over " +
                                  std::to_string(size) + " elements where others reach " + std::to_string(below) +
                                  "; expected elements that do not overlap");
    }
    below += (size - 1) * stride;
  }
  return rows;
}

void require_sizes(int64_t batch, int64_t dim, int64_t threads) {
  require_at_least("batch", batch, 0);
  require_at_least("dim", dim, 0);
  require_at_least("threads", threads, 1);
}

void noise(const std::optional<Tensor>& x0, const Tensor& out, Address sigma, Address sample_ids, int64_t batch,
           int64_t dim, uint64_t seed, int32_t stream, int64_t threads) {
  require_sizes(batch, dim, threads);
  if (batch == 0 || dim == 0) return;
  if (x0) require_address("sigma", sigma);
  require_address("sample_ids", sample_ids);
  const crd::NoisingArgs args{rows_of("x0", x0, dim),
                              written_rows("out", out, batch, dim),
                              reinterpret_cast<const float*>(sigma),
                              {reinterpret_cast<const int64_t*>(sample_ids), seed, stream},
                              batch,
                              dim};
  py::gil_scoped_release unlocked;
  crd::run_noising(args, threads);
}

// `sample_ids` is looked at when the target is made from the seed.
crd::ResidualArgs residual_args(const Tensor& predicted, const std::optional<Tensor>& old, int target_kind, const std::optional<Tensor>& target,
                                Address sample_ids, uint64_t seed, int32_t stream, const std::optional<Tensor>& ref,
                                const std::optional<Tensor>& ref_uncond, float guidance_scale,
                                const std::optional<Tensor>& mask, Address factor, Address count, int64_t batch,
                                int64_t dim) {
  if (target_kind < 0 || target_kind > 3) {
    throw std::invalid_argument("target_kind is " + std::to_string(target_kind) +
                                "; expected 0 (a tensor), 1 (velocity), 2 (clean) or 3 (noise)");
  }
  const auto kind = static_cast<crd::Target>(target_kind);
  if (target.has_value() == (kind == crd::Target::kNoise)) {
    throw std::invalid_argument("target is looked at unless target_kind is 3 (noise)");
  }
  if (kind == crd::Target::kVelocity || kind == crd::Target::kNoise) require_address("sample_ids", sample_ids);
  if (ref_uncond && !ref) throw std::invalid_argument("ref_uncond without ref; expected both or ref alone");
  crd::ResidualArgs args{rows_of("predicted", predicted, dim),
                         rows_of("old", old, dim),
                         kind,
                         rows_of("target", target, dim),
                         {reinterpret_cast<const int64_t*>(sample_ids), seed, stream},
                         rows_of("ref", ref, dim),
                         rows_of("ref_uncond", ref_uncond, dim),
                         guidance_scale,
                         rows_of("mask", mask, dim),
                         reinterpret_cast<const double*>(factor),
                         reinterpret_cast<const double*>(count),
                         batch,
                         dim};
  if (mask && args.mask.dtype != crd::Dtype::kMask) throw std::invalid_argument("mask: expected dtype code 3 (bool)");
  return args;
}

// factor, count (batch,) fp64 or null; mse, mae, kl and, where old is given, old_mse and old_mae (batch,) are written.
void residual_stats(const Tensor& predicted, const std::optional<Tensor>& old, int target_kind,
                    const std::optional<Tensor>& target, Address sample_ids, uint64_t seed, int32_t stream,
                    const std::optional<Tensor>& ref, const std::optional<Tensor>& ref_uncond, float guidance_scale,
                    const std::optional<Tensor>& mask, Address factor, Address count, int64_t batch, int64_t dim,
                    Address mse, Address mae, Address kl, Address old_mse, Address old_mae, int64_t threads) {
  require_sizes(batch, dim, threads);
  if (batch == 0 || dim == 0) return;
  require_address("mse", mse);
  require_address("mae", mae);
  require_address("kl", kl);
  if (old) {
    require_address("old_mse", old_mse);
    require_address("old_mae", old_mae);
  }
  const crd::ResidualArgs args = residual_args(predicted, old, target_kind, target, sample_ids, seed, stream, ref,
                                               ref_uncond, guidance_scale, mask, factor, count, batch, dim);
  const auto floats = [](Address address) { return reinterpret_cast<float*>(address); };
  const crd::ResidualStats stats{floats(mse), floats(mae), floats(kl), floats(old_mse), floats(old_mae)};
  py::gil_scoped_release unlocked;
  crd::run_residual_stats(args, stats, threads);
}

// grad_mse, grad_kl (batch,) fp32 or null; upstream fp32: null for 1, one number, or (batch,). grad is written.
void residual_grad(const Tensor& predicted, int target_kind, const std::optional<Tensor>& target, Address sample_ids,
                   uint64_t seed, int32_t stream, const std::optional<Tensor>& ref,
                   const std::optional<Tensor>& ref_uncond, float guidance_scale, const std::optional<Tensor>& mask,
                   Address factor, Address count, int64_t batch, int64_t dim, Address grad_mse, Address grad_kl,
                   Address upstream, bool upstream_per_sample, const Tensor& grad, int64_t threads) {
  require_sizes(batch, dim, threads);
  if (batch == 0 || dim == 0) return;
  const crd::ResidualArgs args = residual_args(predicted, std::nullopt, target_kind, target, sample_ids, seed, stream,
                                               ref, ref_uncond, guidance_scale, mask, factor, count, batch, dim);
  const crd::Rows grad_rows = written_rows("grad", grad, batch, dim);
  const auto floats = [](Address address) { return reinterpret_cast<const float*>(address); };
  const crd::ResidualSlopes slopes{floats(grad_mse), floats(grad_kl), floats(upstream), upstream_per_sample};
  py::gil_scoped_release unlocked;
  crd::run_residual_grad(args, slopes, grad_rows, threads);
}

const float* floats(const char* name, Address address) {
  require_address(name, address);
  return reinterpret_cast<const float*>(address);
}

float* written_floats(const char* name, Address address) {
  require_address(name, address);
  return reinterpret_cast<float*>(address);
}

// Shapes as in objective.h; group_ids, sample_weights, kl_weights, member_ids and member_values may be null.
void objective(Address mse, Address mae, Address kl, Address old_mse, Address old_mae, Address advantages,
               Address group_ids, Address sample_weights, Address kl_weights, Address member_ids, Address member_values,
               int64_t batch, int64_t members, double beta, double kl_coef, double adv_clip, bool adaptive_weight,
               bool adaptive_kl, double temperature, int loss_type, int reduction, Address loss, Address parts,
               Address samples, Address slopes, Address metrics) {
  require_at_least("batch", batch, 1);
  require_at_least("members", members, 0);
  if ((member_ids == 0) != (member_values == 0)) {
    throw std::invalid_argument("member_ids and member_values go together; expected both or neither");
  }
  if (loss_type < 0 || loss_type > 1) throw std::invalid_argument("loss_type: expected 0 (mse) or 1 (bce)");
  if (reduction < 0 || reduction > 2) throw std::invalid_argument("reduction: expected 0 (none), 1 (sum) or 2 (mean)");
  crd::ObjectiveArgs args{};
  args.mse = floats("mse", mse);
  args.mae = floats("mae", mae);
  args.kl = floats("kl", kl);
  args.old_mse = floats("old_mse", old_mse);
  args.old_mae = floats("old_mae", old_mae);
  args.advantages = floats("advantages", advantages);
  args.group_ids = reinterpret_cast<const int64_t*>(group_ids);
  args.sample_weights = reinterpret_cast<const float*>(sample_weights);
  args.kl_weights = reinterpret_cast<const float*>(kl_weights);
  args.member_ids = reinterpret_cast<const int64_t*>(member_ids);
  args.member_values = reinterpret_cast<const float*>(member_values);
  args.batch = batch;
  args.members = members;
  args.beta = beta;
  args.kl_coef = kl_coef;
  args.adv_clip = adv_clip;
  args.adaptive_weight = adaptive_weight;
  args.adaptive_kl = adaptive_kl;
  args.temperature = temperature;
  args.loss_type = static_cast<crd::LossType>(loss_type);
  args.reduction = static_cast<crd::Reduction>(reduction);
  const crd::ObjectiveResults results{written_floats("loss", loss), written_floats("parts", parts),
                                      written_floats("samples", samples), written_floats("slopes", slopes),
                                      written_floats("metrics", metrics)};
  py::gil_scoped_release unlocked;
  crd::run_objective(args, results);
}

// What sums and gradient share; slope and level (batch,) fp32.
crd::GeneratorArgs generator_args(const Tensor& ta, const Tensor& ref, const std::optional<Tensor>& ref_uncond,
                                  float extra_guidance, const Tensor& s_r, Address slope, Address level,
                                  int64_t batch, int64_t dim) {
  crd::GeneratorArgs args{};
  args.ta = rows_of("ta", ta, dim);
  args.ref = rows_of("ref", ref, dim);
  args.ref_uncond = rows_of("ref_uncond", ref_uncond, dim);
  args.extra_guidance = extra_guidance;
  args.s_r = rows_of("s_r", s_r, dim);
  args.slope = floats("slope", slope);
  args.level = floats("level", level);
  args.batch = batch;
  args.dim = dim;
  return args;
}

// x_t and shift, (batch,) fp32, go together. distance, gap, correction, difference (batch,) fp32 and invalid (batch,)
// int64 are written.
void generator_statistics(const Tensor& ta, const Tensor& ref, const std::optional<Tensor>& ref_uncond,
                          float extra_guidance, const Tensor& s_r, Address slope, Address level,
                          const std::optional<Tensor>& x0, const std::optional<Tensor>& x_t, Address shift,
                          int64_t batch, int64_t dim, Address distance, Address gap, Address correction,
                          Address difference, Address invalid, int64_t threads) {
  require_sizes(batch, dim, threads);
  if (batch == 0 || dim == 0) return;
  if (x_t.has_value() != (shift != 0)) throw std::invalid_argument("x_t and shift go together; expected both or neither");
  crd::GeneratorArgs args = generator_args(ta, ref, ref_uncond, extra_guidance, s_r, slope, level, batch, dim);
  args.x0 = rows_of("x0", x0, dim);
  args.x_t = rows_of("x_t", x_t, dim);
  args.shift = reinterpret_cast<const float*>(shift);
  require_address("invalid", invalid);
  const crd::GeneratorStatistics statistics{written_floats("distance", distance), written_floats("gap", gap),
                                            written_floats("correction", correction),
                                            written_floats("difference", difference),
                                            reinterpret_cast<int64_t*>(invalid)};
  py::gil_scoped_release unlocked;
  crd::run_generator_statistics(args, statistics, threads);
}

// scale (batch,) fp32; upstream: null for 1, or one fp32 number. gradient is written.
void generator_gradient(const Tensor& ta, const Tensor& ref, const std::optional<Tensor>& ref_uncond,
                        float extra_guidance, const Tensor& s_r, Address slope, Address level, Address scale,
                        Address upstream, const Tensor& gradient, int64_t batch, int64_t dim, int64_t threads) {
  require_sizes(batch, dim, threads);
  if (batch == 0 || dim == 0) return;
  const crd::GeneratorArgs args = generator_args(ta, ref, ref_uncond, extra_guidance, s_r, slope, level, batch, dim);
  const float* scales = floats("scale", scale);
  const crd::Rows gradient_rows = written_rows("gradient", gradient, batch, dim);
  py::gil_scoped_release unlocked;
  crd::run_generator_gradient(args, scales, reinterpret_cast<const float*>(upstream), gradient_rows, threads);
}

py::tuple philox4x32(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
  const crd::PhiloxBlock block =
      crd::philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return py::make_tuple(block.word[0], block.word[1], block.word[2], block.word[3]);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of crd_fast: addresses, sizes, strides and dtype codes (0 float32, 1 bfloat16, 2 float16, 3 bool) in.";
  m.def("noise", &noise, "x_t = (1 - sigma) x0 + sigma epsilon in fp32, rounded to the output dtype; epsilon without x0.",
        py::arg("x0"), py::arg("out"), py::arg("sigma"), py::arg("sample_ids"), py::arg("batch"), py::arg("dim"),
        py::arg("seed"), py::arg("stream"), py::arg("threads"));
  m.def("residual_stats", &residual_stats, "Mean squared error, mean absolute error and squared gap to the anchor, per row.",
        py::arg("predicted"), py::arg("old"), py::arg("target_kind"), py::arg("target"), py::arg("sample_ids"),
        py::arg("seed"), py::arg("stream"), py::arg("ref"), py::arg("ref_uncond"), py::arg("guidance_scale"),
        py::arg("mask"), py::arg("factor"), py::arg("count"), py::arg("batch"), py::arg("dim"), py::arg("mse"),
        py::arg("mae"), py::arg("kl"), py::arg("old_mse"), py::arg("old_mae"), py::arg("threads"));
  m.def("residual_grad", &residual_grad, "The gradient of the prediction from those of its statistics, rounded once.",
        py::arg("predicted"), py::arg("target_kind"), py::arg("target"), py::arg("sample_ids"), py::arg("seed"),
        py::arg("stream"), py::arg("ref"), py::arg("ref_uncond"), py::arg("guidance_scale"), py::arg("mask"),
        py::arg("factor"), py::arg("count"), py::arg("batch"), py::arg("dim"), py::arg("grad_mse"), py::arg("grad_kl"),
        py::arg("upstream"), py::arg("upstream_per_sample"), py::arg("grad"), py::arg("threads"));
  m.def("objective", &objective, "The CRD loss of a batch from its residual statistics, with its slopes and metrics.",
        py::arg("mse"), py::arg("mae"), py::arg("kl"), py::arg("old_mse"), py::arg("old_mae"), py::arg("advantages"),
        py::arg("group_ids"), py::arg("sample_weights"), py::arg("kl_weights"), py::arg("member_ids"),
        py::arg("member_values"), py::arg("batch"), py::arg("members"), py::arg("beta"), py::arg("kl_coef"),
        py::arg("adv_clip"), py::arg("adaptive_weight"), py::arg("adaptive_kl"), py::arg("temperature"),
        py::arg("loss_type"), py::arg("reduction"), py::arg("loss"), py::arg("parts"), py::arg("samples"),
        py::arg("slopes"), py::arg("metrics"));
  m.def("generator_statistics", &generator_statistics, "Sums over the valid elements of DIDR's gradient, per row.",
        py::arg("ta"), py::arg("ref"), py::arg("ref_uncond"), py::arg("extra_guidance"), py::arg("s_r"),
        py::arg("slope"), py::arg("level"), py::arg("x0"), py::arg("x_t"), py::arg("shift"), py::arg("batch"),
        py::arg("dim"), py::arg("distance"), py::arg("gap"), py::arg("correction"), py::arg("difference"),
        py::arg("invalid"), py::arg("threads"));
  m.def("generator_gradient", &generator_gradient, "DIDR's gradient in the generator's samples, rounded once.",
        py::arg("ta"), py::arg("ref"), py::arg("ref_uncond"), py::arg("extra_guidance"), py::arg("s_r"),
        py::arg("slope"), py::arg("level"), py::arg("scale"), py::arg("upstream"), py::arg("gradient"),
        py::arg("batch"), py::arg("dim"), py::arg("threads"));
  m.def("philox4x32", &philox4x32, "One Philox4x32-10 block: 4 words from a counter of 4 words and a key of 2.",
        py::arg("counter"), py::arg("key"));
  m.def("after_fork", &crd::after_fork, "Told in a child that was forked before this module was imported.");
  m.def(
      "instruction_set", [] { return crd::name_of(crd::instruction_set()); },
      "The instruction set the kernels run with: portable, avx2 or avx512.");
}
