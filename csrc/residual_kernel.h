// The loops over residuals, compiled once per instruction set (kernels_*.cpp).
//
// Sums are kept in kLanes interleaved fp32 lanes within a tile and in as many fp64 lanes across tiles: every build adds
// in the same order, and the error does not grow with the row.
#pragma once

#include "residual.h"

namespace crd {

constexpr int kLanes = 16;

struct TargetTile {
  alignas(64) float normals[kTileElements];
  alignas(64) float buffer[kTileElements];
};

// The target of elements [start, start + count), read from a tensor or made from the seed.
static inline const float* target_tile(const ResidualArgs& args, int64_t row, int64_t start, int64_t count,
                                       TargetTile& tile) {
  switch (args.target_kind) {
    case Target::kTensor:
    case Target::kClean:
      return load_tile(args.target, row, start, count, tile.buffer);
    case Target::kNoise:
      normal_tile(args.source, row, start, tile.normals);
      return tile.normals;
    case Target::kVelocity: {
      normal_tile(args.source, row, start, tile.normals);
      const float* clean = load_tile(args.target, row, start, count, tile.buffer);
      for (int64_t i = 0; i < count; ++i) tile.normals[i] -= clean[i];
      return tile.normals;
    }
  }
  return nullptr;
}

// The anchor g of elements [start, start + count); `args.ref` must be given.
static inline const float* anchor_tile(const ResidualArgs& args, int64_t row, int64_t start, int64_t count,
                                       float* conditional_buffer, float* unconditional_buffer) {
  const float* conditional = load_tile(args.ref, row, start, count, conditional_buffer);
  if (!given(args.ref_uncond)) return conditional;
  const float* unconditional = load_tile(args.ref_uncond, row, start, count, unconditional_buffer);
  const float scale = args.guidance_scale;
  for (int64_t i = 0; i < count; ++i) {
    conditional_buffer[i] = __builtin_fmaf(scale, conditional[i] - unconditional[i], unconditional[i]);
  }
  return conditional_buffer;
}

// differences[i] = a[i] - b[i] for i < count, 0 where `mask` (or null) is and beyond `count`.
static inline void masked_differences(const float* a, const float* b, const float* mask, int64_t count,
                                      float* differences) {
  if (mask == nullptr) {
    for (int64_t i = 0; i < count; ++i) differences[i] = a[i] - b[i];
  } else {
    for (int64_t i = 0; i < count; ++i) differences[i] = float_of(bits_of(a[i] - b[i]) & bits_of(mask[i]));
  }
  for (int64_t i = count; i < kTileElements; ++i) differences[i] = 0.0f;
}

static inline void add_squares(const float* values, double* lanes) {
  float tile_lanes[kLanes] = {};
  for (int i = 0; i < kTileElements; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      tile_lanes[lane] = __builtin_fmaf(values[i + lane], values[i + lane], tile_lanes[lane]);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += static_cast<double>(tile_lanes[lane]);
}

static inline void add_absolutes(const float* values, double* lanes) {
  float tile_lanes[kLanes] = {};
  for (int i = 0; i < kTileElements; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) tile_lanes[lane] += __builtin_fabsf(values[i + lane]);
  }
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += static_cast<double>(tile_lanes[lane]);
}

static inline double total(const double* lanes) {
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

static inline ResidualSums residual_sums_span(const ResidualArgs& args, int64_t row, int64_t begin, int64_t end) {
  TargetTile target_buffers;
  alignas(64) float predicted_buffer[kTileElements], mask_buffer[kTileElements], differences[kTileElements];
  alignas(64) float conditional_buffer[kTileElements], unconditional_buffer[kTileElements];
  double squared[kLanes] = {}, absolute[kLanes] = {}, gap[kLanes] = {};
  for (int64_t start = begin; start < end; start += kTileElements) {
    const int64_t count = end - start < kTileElements ? end - start : kTileElements;
    const float* predicted = load_tile(args.predicted, row, start, count, predicted_buffer);
    const float* mask = given(args.mask) ? load_tile(args.mask, row, start, count, mask_buffer) : nullptr;
    const float* target = target_tile(args, row, start, count, target_buffers);
    masked_differences(predicted, target, mask, count, differences);
    add_squares(differences, squared);
    add_absolutes(differences, absolute);
    if (given(args.ref)) {
      const float* anchor = anchor_tile(args, row, start, count, conditional_buffer, unconditional_buffer);
      masked_differences(predicted, anchor, mask, count, differences);
      add_squares(differences, gap);
    }
  }
  return {total(squared), total(absolute), total(gap)};
}

static inline void residual_grad_span(const ResidualArgs& args, float error_weight, float gap_weight, const Rows& grad,
                                      int64_t row, int64_t begin, int64_t end) {
  TargetTile target_buffers;
  alignas(64) float predicted_buffer[kTileElements], mask_buffer[kTileElements], gradient[kTileElements];
  alignas(64) float conditional_buffer[kTileElements], unconditional_buffer[kTileElements];
  const bool has_error = error_weight != 0.0f, has_gap = gap_weight != 0.0f && given(args.ref);
  for (int64_t start = begin; start < end; start += kTileElements) {
    const int64_t count = end - start < kTileElements ? end - start : kTileElements;
    const float* predicted = load_tile(args.predicted, row, start, count, predicted_buffer);
    for (int64_t i = 0; i < count; ++i) gradient[i] = 0.0f;
    if (has_error) {
      const float* target = target_tile(args, row, start, count, target_buffers);
      for (int64_t i = 0; i < count; ++i) gradient[i] = error_weight * (predicted[i] - target[i]);
    }
    if (has_gap) {
      const float* anchor = anchor_tile(args, row, start, count, conditional_buffer, unconditional_buffer);
      for (int64_t i = 0; i < count; ++i) {
        gradient[i] = __builtin_fmaf(gap_weight, predicted[i] - anchor[i], gradient[i]);
      }
    }
    if (given(args.mask)) {
      const float* mask = load_tile(args.mask, row, start, count, mask_buffer);
      for (int64_t i = 0; i < count; ++i) gradient[i] = float_of(bits_of(gradient[i]) & bits_of(mask[i]));
    }
    store_tile(gradient, grad, row, start, count);
  }
}

}  // namespace crd
