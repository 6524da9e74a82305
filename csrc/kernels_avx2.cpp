#include "kernels.h"
#include "noising_kernel.h"
#include "residual_kernel.h"

namespace crd {

const Kernels kAvx2Kernels = {&noise_span, &residual_sums_span, &residual_grad_span};

}  // namespace crd
