// Seeded Gaussian noise and the forward process x_t = (1 - sigma) x0 + sigma epsilon.
//
// epsilon of element e of a sample is a function of (seed, stream, sample id, e) alone: Philox with
//   key     = (seed low, seed high)
//   counter = (e / 4 low, stream, sample id low, sample id high)
// whose four words give elements 4k .. 4k+3 by Box-Muller. Batch composition, row order, strides, threads and
// instruction set change nothing.
#pragma once

#include <cstdint>

#include "normal_tile.h"
#include "rows.h"

namespace crd {

struct NoisingArgs {
  Rows x0;  // not given: write epsilon itself
  Rows out;
  const float* sigma;  // (batch,); unused for epsilon
  NoiseSource source;
  int64_t batch;
  int64_t dim;
};

// Runs on at most `threads` threads; `args` must have been validated.
void run_noising(const NoisingArgs& args, int64_t threads);

}  // namespace crd
