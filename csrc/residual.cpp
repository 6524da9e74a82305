#include "residual.h"

#include <vector>

#include "kernels.h"
#include "spans.h"

namespace crd {

void run_residual_sums(const ResidualArgs& args, ResidualSums* sums, int64_t threads) {
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
    }
    sums[row] = total;
  }
}

void run_residual_grad(const ResidualArgs& args, const float* error_weight, const float* gap_weight, const Rows& grad,
                       int64_t threads) {
  const ResidualGradSpan span = kernels().residual_grad;
  for_each_span(args.batch, args.dim, threads, [&](int64_t row, int64_t begin, int64_t end) {
    span(args, error_weight[row], gap_weight[row], grad, row, begin, end);
  });
}

}  // namespace crd
