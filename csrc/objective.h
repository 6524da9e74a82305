// The CRD objective: the mathematics on (batch,) vectors between residual statistics and the loss, with its slopes.
//
// The formulas are those of crd_fast/reference_objective.py, in fp64 and rounded once at the end.
#pragma once

#include <cstdint>

namespace crd {

enum class LossType : int { kMse = 0, kBce = 1 };
enum class Reduction : int { kNone = 0, kSum = 1, kMean = 2 };

constexpr int kObjectiveMetrics = 16;

struct ObjectiveArgs {
  const float *mse, *mae, *kl;    // E, M and K of the trained model, (batch,) like all that follow
  const float *old_mse, *old_mae;
  const float* advantages;
  const int64_t* group_ids;       // null: one group
  const float* sample_weights;    // null: 1
  const float* kl_weights;        // null: 1
  const int64_t* member_ids;      // (members,): samples that group means run over; null: those of this batch
  const float* member_values;     // (3, members): mapped reward, implicit reward, 1 for those that count
  int64_t batch;
  int64_t members;
  double beta, kl_coef, adv_clip;
  bool adaptive_weight, adaptive_kl;
  double temperature;
  LossType loss_type;
  Reduction reduction;
};

struct ObjectiveResults {
  float* loss;     // 1, or batch for kNone
  float* parts;    // (2,) or (2, batch): policy and KL loss
  float* samples;  // (3, batch): implicit reward, K, mapped reward
  float* slopes;   // (2, batch): dL/dE, dL/dK
  float* metrics;  // (kObjectiveMetrics,)
};

void run_objective(const ObjectiveArgs& args, const ObjectiveResults& results);

}  // namespace crd
