// The loops of every kernel, chosen once per process for the machine's instruction set.
#pragma once

#include "generator.h"
#include "noising.h"
#include "residual.h"

namespace crd {

using NoiseSpan = void (*)(const NoisingArgs& args, int64_t row, int64_t begin, int64_t end);
using ResidualSumsSpan = ResidualSums (*)(const ResidualArgs& args, int64_t row, int64_t begin, int64_t end);
using ResidualGradSpan = void (*)(const ResidualArgs& args, float error_weight, float gap_weight, const Rows& grad,
                                  int64_t row, int64_t begin, int64_t end);
using GeneratorSumsSpan = GeneratorSums (*)(const GeneratorArgs& args, int64_t row, int64_t begin, int64_t end);
using GeneratorGradientSpan = void (*)(const GeneratorArgs& args, float scale, float upstream, const Rows& gradient,
                                       int64_t row, int64_t begin, int64_t end);

// Each works on elements [begin, end) of one row; begin is a multiple of 4.
struct Kernels {
  NoiseSpan noise;
  ResidualSumsSpan residual_sums;
  ResidualGradSpan residual_grad;
  GeneratorSumsSpan generator_sums;
  GeneratorGradientSpan generator_gradient;
};

const Kernels& kernels();

// One per compiled instruction set, each from the source file of its name.
extern const Kernels kPortableKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

}  // namespace crd
