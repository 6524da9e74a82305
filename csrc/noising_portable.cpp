#include "noising_kernel.h"

namespace crd {

void noise_span_portable(const NoisingArgs& args, int64_t row, int64_t begin, int64_t end) {
  noise_span(args, row, begin, end);
}

}  // namespace crd
