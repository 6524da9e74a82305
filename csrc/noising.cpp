#include "noising.h"

#include "kernels.h"
#include "spans.h"

namespace crd {

void run_noising(const NoisingArgs& args, int64_t threads) {
  const NoiseSpan span = kernels().noise;
  for_each_span(args.batch, args.dim, threads,
                [&](int64_t row, int64_t begin, int64_t end) { span(args, row, begin, end); });
}

}  // namespace crd
