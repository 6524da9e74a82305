// Which of the compiled instruction sets this machine runs, decided once per process.
#pragma once

namespace crd {

enum class InstructionSet { kPortable, kAvx2, kAvx512 };

// The widest set that was compiled in and that the processor has, or a narrower one named by the environment variable
// CRD_FAST_INSTRUCTION_SET (portable, avx2, avx512). Throws std::invalid_argument when that name is not usable here.
InstructionSet instruction_set();

const char* name_of(InstructionSet set);

}  // namespace crd
