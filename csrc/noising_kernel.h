// The noising loop, included by one source file per instruction set and compiled there with that set's flags.
#pragma once

#include "noising.h"
#include "philox_lanes.h"

namespace crd {

// Writes elements [begin, end) of one row; begin is a multiple of 4.
using NoisingKernel = void (*)(const NoisingArgs& args, int64_t row, int64_t begin, int64_t end);

void noise_span_portable(const NoisingArgs& args, int64_t row, int64_t begin, int64_t end);
void noise_span_avx2(const NoisingArgs& args, int64_t row, int64_t begin, int64_t end);
void noise_span_avx512(const NoisingArgs& args, int64_t row, int64_t begin, int64_t end);

constexpr int kTileBlocks = 64;  // a tile's normals and converted inputs stay in the first-level cache
constexpr int kTileElements = 4 * kTileBlocks;

static inline void normal_tile(int64_t first_block, int64_t sample_id, uint64_t seed, int32_t stream, float* normals) {
  const uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  const uint32_t id0 = static_cast<uint32_t>(sample_id);
  const uint32_t id1 = static_cast<uint32_t>(static_cast<uint64_t>(sample_id) >> 32);
  alignas(64) uint32_t words[4][kTileBlocks];
  philox_lanes(static_cast<uint32_t>(first_block), static_cast<uint32_t>(stream), id0, id1, key0, key1, kTileBlocks,
               words[0], words[1], words[2], words[3]);
  for (int i = 0; i < kTileBlocks; ++i) {
    const PhiloxBlock block{{words[0][i], words[1][i], words[2][i], words[3][i]}};
    box_muller(block, &normals[4 * i], &normals[4 * i + 1], &normals[4 * i + 2], &normals[4 * i + 3]);
  }
}

static inline void load_row(const void* source, Dtype dtype, int64_t offset, int64_t count, float* values) {
  switch (dtype) {
    case Dtype::kFloat32: {
      const float* p = static_cast<const float*>(source) + offset;
      for (int64_t i = 0; i < count; ++i) values[i] = p[i];
      return;
    }
    case Dtype::kBFloat16: {
      const uint16_t* p = static_cast<const uint16_t*>(source) + offset;
      for (int64_t i = 0; i < count; ++i) values[i] = from_bfloat16(p[i]);
      return;
    }
    case Dtype::kFloat16: {
      const uint16_t* p = static_cast<const uint16_t*>(source) + offset;
      for (int64_t i = 0; i < count; ++i) values[i] = from_float16(p[i]);
      return;
    }
  }
}

static inline void store_row(const float* values, Dtype dtype, int64_t offset, int64_t count, void* target) {
  switch (dtype) {
    case Dtype::kFloat32: {
      float* p = static_cast<float*>(target) + offset;
      for (int64_t i = 0; i < count; ++i) p[i] = values[i];
      return;
    }
    case Dtype::kBFloat16: {
      uint16_t* p = static_cast<uint16_t*>(target) + offset;
      for (int64_t i = 0; i < count; ++i) p[i] = to_bfloat16(values[i]);
      return;
    }
    case Dtype::kFloat16: {
      uint16_t* p = static_cast<uint16_t*>(target) + offset;
      for (int64_t i = 0; i < count; ++i) p[i] = to_float16(values[i]);
      return;
    }
  }
}

static inline void noise_span(const NoisingArgs& args, int64_t row, int64_t begin, int64_t end) {
  alignas(64) float normals[kTileElements];
  alignas(64) float clean[kTileElements];
  for (int64_t start = begin; start < end; start += kTileElements) {
    const int64_t count = end - start < kTileElements ? end - start : kTileElements;
    normal_tile(start / 4, args.sample_ids[row], args.seed, args.stream, normals);
    if (args.x0 != nullptr) {
      const float sigma = args.sigma[row];
      const float keep = 1.0f - sigma;
      load_row(args.x0, args.x0_dtype, row * args.x0_row_stride + start, count, clean);
      for (int64_t i = 0; i < count; ++i) normals[i] = __builtin_fmaf(sigma, normals[i], keep * clean[i]);
    }
    store_row(normals, args.out_dtype, row * args.out_row_stride + start, count, args.out);
  }
}

}  // namespace crd
