#include "kernels.h"

#include "instruction_set.h"

namespace crd {

const Kernels& kernels() {
#if defined(CRD_X86)
  switch (instruction_set()) {
    case InstructionSet::kAvx512:
      return kAvx512Kernels;
    case InstructionSet::kAvx2:
      return kAvx2Kernels;
    case InstructionSet::kPortable:
      break;
  }
#endif
  return kPortableKernels;
}

}  // namespace crd
