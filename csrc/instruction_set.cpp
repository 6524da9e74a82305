#include "instruction_set.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(CRD_X86)
#include <cpuid.h>
#endif

namespace crd {
namespace {

#if defined(CRD_X86)
// __builtin_cpu_supports knows the name "f16c" from GCC 11 and Clang 18 on.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & (1u << 29)) != 0;
}
#endif

InstructionSet widest() {
#if defined(CRD_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return InstructionSet::kAvx512;
  }
  if (avx2) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kPortable;
}

InstructionSet choose() {
  const InstructionSet best = widest();
  const char* wanted = std::getenv("CRD_FAST_INSTRUCTION_SET");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (InstructionSet set : {InstructionSet::kPortable, InstructionSet::kAvx2, InstructionSet::kAvx512}) {
    if (set <= best && std::string(wanted) == name_of(set)) return set;
  }
  throw std::invalid_argument("CRD_FAST_INSTRUCTION_SET is '" + std::string(wanted) +
                              "'; this machine runs portable up to " + name_of(best) +
                              "; unset it or name one of those");
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet chosen = choose();
  return chosen;
}

const char* name_of(InstructionSet set) {
  switch (set) {
    case InstructionSet::kPortable:
      return "portable";
    case InstructionSet::kAvx2:
      return "avx2";
    case InstructionSet::kAvx512:
      return "avx512";
  }
  throw std::logic_error("unknown instruction set");
}

}  // namespace crd
