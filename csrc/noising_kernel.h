// The noising loop, compiled once per instruction set (kernels_*.cpp).
#pragma once

#include "noising.h"

namespace crd {

// Writes elements [begin, end) of one row; begin is a multiple of 4.
static inline void noise_span(const NoisingArgs& args, int64_t row, int64_t begin, int64_t end) {
  alignas(64) float normals[kTileElements];
  alignas(64) float buffer[kTileElements];
  for (int64_t start = begin; start < end; start += kTileElements) {
    const int64_t count = end - start < kTileElements ? end - start : kTileElements;
    normal_tile(args.source, row, start, normals);
    if (given(args.x0)) {
      const float sigma = args.sigma[row];
      const float keep = 1.0f - sigma;
      const float* clean = load_tile(args.x0, row, start, count, buffer);
      for (int64_t i = 0; i < count; ++i) normals[i] = __builtin_fmaf(sigma, normals[i], keep * clean[i]);
    }
    store_tile(normals, args.out, row, start, count);
  }
}

}  // namespace crd
