#include "generator_kernel.h"
#include "kernels.h"
#include "noising_kernel.h"
#include "residual_kernel.h"

namespace crd {

const Kernels kAvx2Kernels = {&noise_span, &residual_sums_span, &residual_grad_span, &generator_sums_span,
                              &generator_gradient_span};

}  // namespace crd
