// Residual statistics of a batch and their gradient: the only two latent-sized computations of a forward-process loss.
//
//   E = mean (f - y)^2,  M = mean |f - y|,  K = mean (f - g)^2,   g = u + w (c - u), or c without u
//   dL/df = 2/count (dL/dE (f - y) + dL/dK (f - g))
//
// E and K carry the square of a sample's factor, M the factor itself.
//
// The target y is a tensor, or is made in registers from x0 and the seed: epsilon - x0, x0, or epsilon.
#pragma once

#include <cstdint>

#include "normal_tile.h"
#include "rows.h"

namespace crd {

enum class Target : int { kTensor = 0, kVelocity = 1, kClean = 2, kNoise = 3 };

struct ResidualArgs {
  Rows predicted;
  Rows old;  // a second prediction of the same target, whose E and M are wanted too; not given: none
  Target target_kind;
  Rows target;         // kTensor: y; kVelocity and kClean: x0; kNoise: not given
  NoiseSource source;  // kVelocity and kNoise
  Rows ref;            // c; not given: no anchor
  Rows ref_uncond;     // u
  float guidance_scale;
  Rows mask;             // not given: every element is valid
  const double* factor;  // (batch,): turns errors into velocity errors; null: 1
  const double* count;   // (batch,): valid elements, at least 1; null: dim
  int64_t batch;
  int64_t dim;
};

// Sums over the valid elements of a span of a row.
struct ResidualSums {
  double squared = 0;   // (f - y)^2
  double absolute = 0;  // |f - y|
  double gap = 0;       // (f - g)^2
  double old_squared = 0, old_absolute = 0;
};

// (batch,) each; kl is 0 without an anchor, the last two are not written without an old prediction.
struct ResidualStats {
  float *mse, *mae, *kl, *old_mse, *old_mae;
};

// Sums are added in a fixed order.
void run_residual_stats(const ResidualArgs& args, const ResidualStats& stats, int64_t threads);

// dL/dE and dL/dK of every sample, null for none, each times `upstream`: null for 1, one number, or one a sample.
struct ResidualSlopes {
  const float *mse, *kl;
  const float* upstream;
  bool upstream_per_sample;
};

// dL/df; 0 where the mask is. A slope of zero drops its term, whatever the tensors hold.
void run_residual_grad(const ResidualArgs& args, const ResidualSlopes& slopes, const Rows& grad, int64_t threads);

}  // namespace crd
