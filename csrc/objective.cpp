#include "objective.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace crd {
namespace {

constexpr double kMaeFloor = 1e-5;
constexpr double kKlFloor = 1e-4;

struct Member {
  int64_t group_id;
  double reward;    // a
  double implicit;  // r
};

struct Means {
  double reward = 0, implicit = 0;
};

struct Group {
  int64_t id;
  int64_t size;
  Means means[2];  // in each direction of centering
};

struct Sample {
  bool active = false, anchored = false;
  double weight = 1, kl_weight = 1;
  double advantage = 0, mse = 0, mae = 0, kl = 0, old_mse = 0, old_mae = 0;  // 0 where left out
  double reward = 0.5, implicit = 0;
  double slope = 0;  // dr/dE
  double policy = 0, anchor = 0, centered = 0;
  bool alone = false;
};

double mapped_reward(double advantage, double clip) {
  const double clipped = std::isnan(advantage) ? advantage : std::clamp(advantage, -clip, clip);
  return clipped / (2.0 * clip) + 0.5;
}

// NaN stays NaN, as torch.clamp has it.
double at_least(double value, double least) { return value < least ? least : value; }

// volatile: GCC 12 at -O3 drops a conversion to float and back in a loop.
double rounded_to_float(double value) {
  const volatile float rounded = static_cast<float>(value);
  return rounded;
}

Sample read_sample(const ObjectiveArgs& args, int64_t i) {
  Sample sample;
  sample.weight = args.sample_weights == nullptr ? 1.0 : args.sample_weights[i];
  sample.kl_weight = args.kl_weights == nullptr ? 1.0 : args.kl_weights[i];
  sample.active = sample.weight != 0.0;
  sample.anchored = sample.active && sample.kl_weight != 0.0;
  if (sample.active) {
    sample.advantage = args.advantages[i];
    sample.mse = args.mse[i];
    sample.mae = args.mae[i];
    sample.old_mse = args.old_mse[i];
    sample.old_mae = args.old_mae[i];
  }
  if (sample.anchored) sample.kl = args.kl[i];
  sample.reward = mapped_reward(sample.advantage, args.adv_clip);
  const double divisor = args.adaptive_weight ? at_least(sample.mae, kMaeFloor) : 1.0;
  const double old_divisor = args.adaptive_weight ? at_least(sample.old_mae, kMaeFloor) : 1.0;
  sample.implicit = sample.old_mse / old_divisor - sample.mse / divisor;
  sample.slope = -1.0 / divisor;
  return sample;
}

// Means over members [begin, end) with weights that `weigh` gives, all of them when they add up to nothing.
template <class Weigh>
Means weighted_means(const Member* begin, const Member* end, const Weigh& weigh) {
  Means sums;
  double total = 0;
  for (const Member* member = begin; member != end; ++member) {
    const double weight = weigh(*member);
    if (weight == 0.0) continue;
    total += weight;
    sums.reward += weight * member->reward;
    sums.implicit += weight * member->implicit;
  }
  return {sums.reward / total, sums.implicit / total};
}

Means mean_of_side(const Member* begin, const Member* end, bool above) {
  const auto chosen = [&](const Member& m) { return above ? m.reward > 0.5 : m.reward < 0.5; };
  if (std::none_of(begin, end, chosen)) return weighted_means(begin, end, [](const Member&) { return 1.0; });
  return weighted_means(begin, end, [&](const Member& m) { return chosen(m) ? 1.0 : 0.0; });
}

Means softmax_mean(const Member* begin, const Member* end, double scale) {
  double highest = scale * begin->reward;
  for (const Member* member = begin; member != end; ++member) highest = std::max(highest, scale * member->reward);
  return weighted_means(begin, end, [&](const Member& m) { return std::exp(scale * m.reward - highest); });
}

// Groups in the order of their ids, from members in the order of theirs.
std::vector<Group> groups_of(const std::vector<Member>& members, double temperature) {
  std::vector<Group> groups;
  for (size_t first = 0; first < members.size();) {
    size_t last = first;
    while (last < members.size() && members[last].group_id == members[first].group_id) ++last;
    const Member *begin = members.data() + first, *end = members.data() + last;
    Group group{members[first].group_id, static_cast<int64_t>(last - first), {}};
    if (std::isinf(temperature)) {
      group.means[0] = weighted_means(begin, end, [](const Member&) { return 1.0; });
    } else if (temperature == 0.0) {
      group.means[0] = mean_of_side(begin, end, true);
      group.means[1] = mean_of_side(begin, end, false);
    } else {
      group.means[0] = softmax_mean(begin, end, 1.0 / temperature);
      group.means[1] = softmax_mean(begin, end, -1.0 / temperature);
    }
    groups.push_back(group);
    first = last;
  }
  return groups;
}

std::vector<Member> sorted_members(const ObjectiveArgs& args, const std::vector<Sample>& samples) {
  std::vector<Member> members;
  if (args.member_ids == nullptr) {
    for (int64_t i = 0; i < args.batch; ++i) {
      const Sample& sample = samples[static_cast<size_t>(i)];
      const int64_t id = args.group_ids == nullptr ? 0 : args.group_ids[i];
      if (sample.active) members.push_back({id, sample.reward, sample.implicit});
    }
  } else {
    const float* values = args.member_values;
    for (int64_t i = 0; i < args.members; ++i) {
      if (values[2 * args.members + i] == 0.0f) continue;
      members.push_back({args.member_ids[i], values[i], values[args.members + i]});
    }
  }
  std::stable_sort(members.begin(), members.end(),
                   [](const Member& a, const Member& b) { return a.group_id < b.group_id; });
  return members;
}

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

// Policy and KL loss of a sample, and its slopes in E and K.
void finish_sample(const ObjectiveArgs& args, const std::vector<Group>& groups, int64_t id, Sample& sample,
                   double* mse_slope, double* kl_slope) {
  const auto found = std::lower_bound(groups.begin(), groups.end(), id,
                                      [](const Group& group, int64_t wanted) { return group.id < wanted; });
  static const Group kNobody{0, 0, {}};
  const Group& group = found != groups.end() && found->id == id ? *found : kNobody;
  const int directions = std::isinf(args.temperature) ? 1 : 2;
  double loss = 0, slope = 0;  // slope: d loss / d r
  for (int direction = 0; direction < directions; ++direction) {
    const Means& mean = group.means[direction];
    const double estimate = args.beta * (sample.implicit - mean.implicit), wanted = sample.reward - mean.reward;
    if (args.loss_type == LossType::kMse) {
      loss += (estimate - wanted) * (estimate - wanted);
      slope += 2.0 * args.beta * (estimate - wanted);
    } else {
      const double target = sigmoid(wanted);
      loss += at_least(estimate, 0.0) - estimate * target + std::log1p(std::exp(-std::fabs(estimate)));
      slope += args.beta * (sigmoid(estimate) - target);
    }
  }
  const double scale = sample.weight * args.adv_clip / (args.beta * directions);
  sample.policy = scale * loss;
  sample.centered = sample.implicit - group.means[0].implicit;
  sample.alone = sample.active && group.size == 1;
  *mse_slope = sample.active ? scale * slope * sample.slope : 0.0;
  *kl_slope = 0.0;
  if (args.kl_coef != 0.0) {
    const double floor = kKlFloor / args.kl_coef;
    const double kappa = args.adaptive_kl ? floor + sample.reward * (1.0 - floor) : 1.0;
    const double anchor_slope = sample.weight * sample.kl_weight * args.kl_coef * kappa;
    sample.anchor = anchor_slope * sample.kl;
    if (sample.anchored) *kl_slope = anchor_slope;
  }
}

class ActiveMean {
 public:
  explicit ActiveMean(const std::vector<Sample>& samples) : samples_(samples) {
    for (const Sample& sample : samples) count_ += sample.active;
  }
  int64_t count() const { return count_; }
  double divisor() const { return static_cast<double>(std::max<int64_t>(count_, 1)); }

  template <class Value>
  double operator()(const Value& value) const {
    double sum = 0;
    for (const Sample& sample : samples_) {
      if (sample.active) sum += value(sample);
    }
    return sum / divisor();
  }

  template <class Value>
  double deviation(const Value& value) const {
    const double mean = (*this)(value);
    return std::sqrt((*this)([&](const Sample& s) { return (value(s) - mean) * (value(s) - mean); }));
  }

 private:
  const std::vector<Sample>& samples_;
  int64_t count_ = 0;
};

// In the order of reference_objective.METRICS.
void write_metrics(const ObjectiveArgs& args, const std::vector<Sample>& samples, const ActiveMean& mean,
                   float* metrics) {
  const double policy = mean([](const Sample& s) { return s.policy; });
  const double anchor = mean([](const Sample& s) { return s.anchor; });
  const auto implicit = [](const Sample& s) { return s.implicit; };
  const auto reward = [](const Sample& s) { return s.reward; };
  const auto alone = std::count_if(samples.begin(), samples.end(), [](const Sample& s) { return s.alone; });
  const double values[kObjectiveMetrics] = {
      policy + anchor,
      policy,
      anchor,
      mean([](const Sample& s) { return s.kl_weight * s.kl; }),
      mean(implicit),
      mean.deviation(implicit),
      mean.deviation([](const Sample& s) { return s.centered; }),
      mean(reward),
      mean.deviation(reward),
      mean([&](const Sample& s) { return std::fabs(s.advantage) > args.adv_clip ? 1.0 : 0.0; }),
      static_cast<double>(alone),
      static_cast<double>(mean.count()),
      mean([](const Sample& s) { return s.mse; }),
      mean([](const Sample& s) { return s.mae; }),
      mean([](const Sample& s) { return s.old_mse; }),
      mean([](const Sample& s) { return s.old_mae; }),
  };
  for (int i = 0; i < kObjectiveMetrics; ++i) metrics[i] = static_cast<float>(values[i]);
}

}  // namespace

void run_objective(const ObjectiveArgs& args, const ObjectiveResults& results) {
  std::vector<Sample> samples;
  samples.reserve(static_cast<size_t>(args.batch));
  for (int64_t i = 0; i < args.batch; ++i) samples.push_back(read_sample(args, i));
  if (args.member_ids != nullptr) {
    // As they are among the members, so that a sample alone in its group is exactly at its mean.
    for (Sample& sample : samples) {
      sample.implicit = rounded_to_float(sample.implicit);
      sample.reward = rounded_to_float(sample.reward);
    }
  }
  const std::vector<Group> groups = groups_of(sorted_members(args, samples), args.temperature);
  const ActiveMean mean(samples);
  const double divisor = args.reduction == Reduction::kMean ? mean.divisor() : 1.0;
  double policy = 0, anchor = 0;
  for (int64_t i = 0; i < args.batch; ++i) {
    Sample& sample = samples[static_cast<size_t>(i)];
    double mse_slope, kl_slope;
    finish_sample(args, groups, args.group_ids == nullptr ? 0 : args.group_ids[i], sample, &mse_slope, &kl_slope);
    results.samples[i] = static_cast<float>(sample.implicit);
    results.samples[args.batch + i] = static_cast<float>(sample.kl);
    results.samples[2 * args.batch + i] = static_cast<float>(sample.reward);
    results.slopes[i] = static_cast<float>(mse_slope / divisor);
    results.slopes[args.batch + i] = static_cast<float>(kl_slope / divisor);
    const double own_policy = sample.active ? sample.policy : 0.0, own_anchor = sample.active ? sample.anchor : 0.0;
    policy += own_policy;
    anchor += own_anchor;
    if (args.reduction == Reduction::kNone) {
      results.loss[i] = static_cast<float>(own_policy + own_anchor);
      results.parts[i] = static_cast<float>(own_policy);
      results.parts[args.batch + i] = static_cast<float>(own_anchor);
    }
  }
  if (args.reduction != Reduction::kNone) {
    results.loss[0] = static_cast<float>((policy + anchor) / divisor);
    results.parts[0] = static_cast<float>(policy / divisor);
    results.parts[1] = static_cast<float>(anchor / divisor);
  }
  write_metrics(args, samples, mean, results.metrics);
}

}  // namespace crd
