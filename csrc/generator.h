// The element-wise mathematics of DIDR's generator stage: sums of a batch, and the gradient of its samples.
//
//   p = c + (w - 1)(c - u), or c without u            the reference's guided prediction
//   gap = slope (ta - p)                              x0_psi - x0_ref: what both say of x_t cancels
//   correction = level s_r,   D = gap - correction
//   g = scale D                                       0 where it is not finite
//
// slope, shift, level and scale are of a sample. An element whose D is not finite adds to no sum.
#pragma once

#include <cstdint>

#include "rows.h"

namespace crd {

struct GeneratorArgs {
  Rows ta;
  Rows ref;              // c
  Rows ref_uncond;       // u; not given: p is c
  float extra_guidance;  // w - 1
  Rows s_r;
  const float* slope;  // (batch,) each
  const float* level;
  Rows x0;             // the sums alone; not given: no distance
  Rows x_t;            // the sums alone; not given: a clean estimate is slope times its prediction
  const float* shift;  // (batch,): a clean estimate is shift x_t + slope times its prediction
  int64_t batch;
  int64_t dim;
};

// Sums over the valid elements of a span of a row.
struct GeneratorSums {
  double distance = 0;                             // |x0 - shift x_t - slope p|
  double gap = 0, correction = 0, difference = 0;  // squares, of D the last
  int64_t invalid = 0;
};

// (batch,) each; distance is 0 without x0.
struct GeneratorStatistics {
  float *distance, *gap, *correction, *difference;
  int64_t* invalid;
};

// Sums are added in a fixed order, that of the elements in a sample and not of the memory.
void run_generator_statistics(const GeneratorArgs& args, const GeneratorStatistics& statistics, int64_t threads);

// g times `upstream`, null for 1. A sample with a scale of zero is 0, whatever the tensors hold.
void run_generator_gradient(const GeneratorArgs& args, const float* scale, const float* upstream, const Rows& gradient,
                            int64_t threads);

}  // namespace crd
