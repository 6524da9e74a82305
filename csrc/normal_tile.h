// Standard normals of a run of elements of one sample.
#pragma once

#include "philox_lanes.h"

namespace crd {

constexpr int kTileBlocks = 64;  // a tile's normals and converted inputs stay in the first-level cache
constexpr int kTileElements = 4 * kTileBlocks;

// What the noise of a batch is a function of, beside the element: see noising.h.
struct NoiseSource {
  const int64_t* sample_ids;  // (batch,)
  uint64_t seed;
  int32_t stream;
};

// Writes kTileElements normals, those of elements `start` (a multiple of 4) and up of a row.
static inline void normal_tile(const NoiseSource& source, int64_t row, int64_t start, float* normals) {
  const uint32_t key0 = static_cast<uint32_t>(source.seed), key1 = static_cast<uint32_t>(source.seed >> 32);
  const uint64_t sample_id = static_cast<uint64_t>(source.sample_ids[row]);
  alignas(64) uint32_t words[4][kTileBlocks];
  philox_lanes(static_cast<uint32_t>(start / 4), static_cast<uint32_t>(source.stream), static_cast<uint32_t>(sample_id),
               static_cast<uint32_t>(sample_id >> 32), key0, key1, kTileBlocks, words[0], words[1], words[2], words[3]);
  for (int i = 0; i < kTileBlocks; ++i) {
    const PhiloxBlock block{{words[0][i], words[1][i], words[2][i], words[3][i]}};
    box_muller(block, &normals[4 * i], &normals[4 * i + 1], &normals[4 * i + 2], &normals[4 * i + 3]);
  }
}

}  // namespace crd
