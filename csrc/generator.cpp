#include "generator.h"

#include <vector>

#include "kernels.h"
#include "spans.h"

namespace crd {

void run_generator_statistics(const GeneratorArgs& args, const GeneratorStatistics& statistics, int64_t threads) {
  const GeneratorSumsSpan span = kernels().generator_sums;
  const int64_t spans = spans_per_row(args.dim);
  std::vector<GeneratorSums> partial(static_cast<size_t>(args.batch * spans));
  for_each_span(args.batch, args.dim, threads, [&](int64_t row, int64_t begin, int64_t end) {
    partial[static_cast<size_t>(row * spans + begin / kSpanElements)] = span(args, row, begin, end);
  });
  for (int64_t row = 0; row < args.batch; ++row) {
    GeneratorSums total;
    for (int64_t i = 0; i < spans; ++i) {
      const GeneratorSums& part = partial[static_cast<size_t>(row * spans + i)];
      total.distance += part.distance;
      total.gap += part.gap;
      total.correction += part.correction;
      total.difference += part.difference;
      total.invalid += part.invalid;
    }
    statistics.distance[row] = static_cast<float>(total.distance);
    statistics.gap[row] = static_cast<float>(total.gap);
    statistics.correction[row] = static_cast<float>(total.correction);
    statistics.difference[row] = static_cast<float>(total.difference);
    statistics.invalid[row] = total.invalid;
  }
}

void run_generator_gradient(const GeneratorArgs& args, const float* scale, const float* upstream, const Rows& gradient,
                            int64_t threads) {
  const GeneratorGradientSpan span = kernels().generator_gradient;
  const float factor = upstream == nullptr ? 1.0f : *upstream;
  for_each_span(args.batch, args.dim, threads, [&](int64_t row, int64_t begin, int64_t end) {
    span(args, scale[row], factor, gradient, row, begin, end);
  });
}

}  // namespace crd
