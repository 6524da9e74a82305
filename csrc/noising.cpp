#include "noising.h"

#include <algorithm>

#include "instruction_set.h"
#include "noising_kernel.h"
#include "parallel.h"

namespace crd {
namespace {

// Work item: large enough that starting a thread (tens of microseconds) is worth it, a multiple of the tile.
constexpr int64_t kChunkElements = 64 * kTileElements;

NoisingKernel kernel_for(InstructionSet set) {
#if defined(CRD_X86)
  if (set == InstructionSet::kAvx512) return noise_span_avx512;
  if (set == InstructionSet::kAvx2) return noise_span_avx2;
#endif
  (void)set;
  return noise_span_portable;
}

}  // namespace

void run_noising(const NoisingArgs& args, int64_t threads) {
  const NoisingKernel kernel = kernel_for(instruction_set());
  const int64_t chunks_per_row = (args.dim + kChunkElements - 1) / kChunkElements;
  // Rows shorter than a chunk are handed out in groups, so that a group is about one chunk of work.
  const int64_t rows_per_item = args.dim == 0 ? 1 : std::max<int64_t>(1, kChunkElements / args.dim);
  const int64_t row_groups = (args.batch + rows_per_item - 1) / rows_per_item;
  parallel_for(row_groups * chunks_per_row, threads, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t begin = item % chunks_per_row * kChunkElements;
      const int64_t end = std::min(args.dim, begin + kChunkElements);
      const int64_t first_row = item / chunks_per_row * rows_per_item;
      const int64_t last_row = std::min(args.batch, first_row + rows_per_item);
      for (int64_t row = first_row; row < last_row; ++row) kernel(args, row, begin, end);
    }
  });
}

}  // namespace crd
