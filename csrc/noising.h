// Seeded Gaussian noise and the forward process x_t = (1 - sigma) x0 + sigma epsilon.
//
// epsilon of element e of a sample is a function of (seed, stream, sample id, e) alone: Philox with
//   key     = (seed low, seed high)
//   counter = (e / 4 low, stream, sample id low, sample id high)
// whose four words give elements 4k .. 4k+3 by Box-Muller. Batch composition, row order, strides, threads and
// instruction set change nothing.
#pragma once

#include <cstdint>

#include "element.h"

namespace crd {

struct NoisingArgs {
  const void* x0;  // (batch, dim) with rows x0_row_stride elements apart; null to write epsilon itself
  Dtype x0_dtype;
  int64_t x0_row_stride;
  void* out;  // (batch, dim) with rows out_row_stride elements apart
  Dtype out_dtype;
  int64_t out_row_stride;
  const float* sigma;         // (batch,); unused for epsilon
  const int64_t* sample_ids;  // (batch,)
  int64_t batch;
  int64_t dim;
  uint64_t seed;
  int32_t stream;
};

// Runs on at most `threads` threads; `args` must have been validated.
void run_noising(const NoisingArgs& args, int64_t threads);

}  // namespace crd
