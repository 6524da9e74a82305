#include "residual.h"

#include <vector>

#include "kernels.h"
#include "spans.h"

namespace crd {

namespace {

double factor_of(const ResidualArgs& args, int64_t row) { return args.factor == nullptr ? 1.0 : args.factor[row]; }

double count_of(const ResidualArgs& args, int64_t row) {
  return args.count == nullptr ? static_cast<double>(args.dim) : args.count[row];
}

}  // namespace

void run_residual_stats(const ResidualArgs& args, const ResidualStats& stats, int64_t threads) {
  const ResidualSumsSpan span = kernels().residual_sums;
  const int64_t spans = spans_per_row(args.dim);
  std::vector<ResidualSums> partial(static_cast<size_t>(args.batch * spans));
  for_each_span(args.batch, args.dim, threads, [&](int64_t row, int64_t begin, int64_t end) {
    partial[static_cast<size_t>(row * spans + begin / kSpanElements)] = span(args, row, begin, end);
  });
  for (int64_t row = 0; row < args.batch; ++row) {
    ResidualSums total;
    for (int64_t i = 0; i < spans; ++i) {
      const ResidualSums& part = partial[static_cast<size_t>(row * spans + i)];
      total.squared += part.squared;
      total.absolute += part.absolute;
      total.gap += part.gap;
      total.old_squared += part.old_squared;
      total.old_absolute += part.old_absolute;
    }
    const double factor = factor_of(args, row), count = count_of(args, row);
    stats.mse[row] = static_cast<float>(factor * factor * (total.squared / count));
    stats.mae[row] = static_cast<float>(factor * (total.absolute / count));
    stats.kl[row] = static_cast<float>(factor * factor * (total.gap / count));
    if (!given(args.old)) continue;
    stats.old_mse[row] = static_cast<float>(factor * factor * (total.old_squared / count));
    stats.old_mae[row] = static_cast<float>(factor * (total.old_absolute / count));
  }
}

void run_residual_grad(const ResidualArgs& args, const ResidualSlopes& slopes, const Rows& grad, int64_t threads) {
  const ResidualGradSpan span = kernels().residual_grad;
  for_each_span(args.batch, args.dim, threads, [&](int64_t row, int64_t begin, int64_t end) {
    const double factor = factor_of(args, row);
    const float upstream = slopes.upstream == nullptr ? 1.0f : slopes.upstream[slopes.upstream_per_sample ? row : 0];
    const double scale = 2.0 * factor * factor / count_of(args, row) * upstream;
    const auto weight = [&](const float* slope) {
      // not NaN where upstream is infinite, as it is when a gradient scaler overflows
      return slope == nullptr || slope[row] == 0.0f ? 0.0f : static_cast<float>(scale * slope[row]);
    };
    span(args, weight(slopes.mse), weight(slopes.kl), grad, row, begin, end);
  });
}

}  // namespace crd
