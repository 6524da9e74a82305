// The loops over residuals, compiled once per instruction set (kernels_*.cpp).
//
// Sums are kept in kLanes interleaved fp32 lanes within a tile and in as many fp64 lanes across tiles: every build adds
// in the same order, and the error does not grow with the row.
//
// A whole tile whose tensors are contiguous and of one dtype is read where it lies; any other is first brought into
// fp32 buffers. Both run the same loop, on `Element`s of that dtype or of fp32.
#pragma once

#include <type_traits>

#include "residual.h"

namespace crd {
namespace {

enum class TargetFrom { kStored, kNormals, kNormalsMinusStored };
enum class AnchorFrom { kNothing, kStored, kGuided };

// Where the elements of a tile are. Pointers that a loop's sources do not name are not looked at.
template <class Element>
struct TilePlaces {
  const typename Element::Stored* predicted = nullptr;
  const typename Element::Stored* old = nullptr;
  const typename Element::Stored* target = nullptr;
  const typename Element::Stored* conditional = nullptr;
  const typename Element::Stored* unconditional = nullptr;
  const float* normals = nullptr;
  const float* mask = nullptr;  // null: every element counts
};

struct TileBuffers {
  alignas(64) float predicted[kTileElements];
  alignas(64) float old[kTileElements];
  alignas(64) float target[kTileElements];
  alignas(64) float conditional[kTileElements];
  alignas(64) float unconditional[kTileElements];
  alignas(64) float normals[kTileElements];
  alignas(64) float mask[kTileElements];
};

struct TileSums {
  double squared[kLanes] = {}, absolute[kLanes] = {}, gap[kLanes] = {};
  double old_squared[kLanes] = {}, old_absolute[kLanes] = {};
};

static inline void add_lanes(Lanes values, double* sums) {
  alignas(64) float tile[kLanes];
  store_lanes(values, tile);
  for (int lane = 0; lane < kLanes; ++lane) sums[lane] += static_cast<double>(tile[lane]);
}

static inline double total(const double* lanes) {
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

template <TargetFrom kTarget, class Element>
static inline Lanes target_lanes(const TilePlaces<Element>& tile, int64_t i) {
  if constexpr (kTarget == TargetFrom::kStored) return Element::load_lanes(tile.target + i);
  const Lanes normals = load_lanes(tile.normals + i);
  if constexpr (kTarget == TargetFrom::kNormalsMinusStored) return normals - Element::load_lanes(tile.target + i);
  return normals;
}

template <AnchorFrom kAnchor, class Element>
static inline Lanes anchor_lanes(const TilePlaces<Element>& tile, int64_t i, Lanes guidance_scale) {
  const Lanes conditional = Element::load_lanes(tile.conditional + i);
  if constexpr (kAnchor == AnchorFrom::kStored) return conditional;
  const Lanes unconditional = Element::load_lanes(tile.unconditional + i);
  return fused(guidance_scale, conditional - unconditional, unconditional);
}

// Five streams are more than the hardware's prefetching keeps up with. What lies beyond a row is not read.
template <class Element>
static inline void fetch_ahead(const typename Element::Stored* place) {
  __builtin_prefetch(reinterpret_cast<const char*>(place) + 2048);
}

static inline Lanes masked(Lanes values, const float* mask, int64_t i) {
  return mask == nullptr ? values : values & load_lanes(mask + i);
}

// `count` is a multiple of kLanes.
template <TargetFrom kTarget, AnchorFrom kAnchor, bool kOld, class Element>
static inline void add_tile(const TilePlaces<Element>& tile, int64_t count, float guidance_scale, TileSums& sums) {
  const Lanes scale = splat(guidance_scale), zero = splat(0.0f);
  Lanes squared = zero, absolutes = zero, gap = zero, old_squared = zero, old_absolutes = zero;
  for (int64_t i = 0; i < count; i += kLanes) {
    fetch_ahead<Element>(tile.predicted + i);
    fetch_ahead<Element>(tile.target + i);
    if constexpr (kOld) fetch_ahead<Element>(tile.old + i);
    if constexpr (kAnchor != AnchorFrom::kNothing) fetch_ahead<Element>(tile.conditional + i);
    if constexpr (kAnchor == AnchorFrom::kGuided) fetch_ahead<Element>(tile.unconditional + i);
    const Lanes predicted = Element::load_lanes(tile.predicted + i);
    const Lanes target = target_lanes<kTarget>(tile, i);
    const Lanes error = masked(predicted - target, tile.mask, i);
    squared = fused(error, error, squared);
    absolutes = absolutes + absolute(error);
    if constexpr (kOld) {
      const Lanes old_error = masked(Element::load_lanes(tile.old + i) - target, tile.mask, i);
      old_squared = fused(old_error, old_error, old_squared);
      old_absolutes = old_absolutes + absolute(old_error);
    }
    if constexpr (kAnchor != AnchorFrom::kNothing) {
      const Lanes apart = masked(predicted - anchor_lanes<kAnchor>(tile, i, scale), tile.mask, i);
      gap = fused(apart, apart, gap);
    }
  }
  add_lanes(squared, sums.squared);
  add_lanes(absolutes, sums.absolute);
  if constexpr (kOld) {
    add_lanes(old_squared, sums.old_squared);
    add_lanes(old_absolutes, sums.old_absolute);
  }
  if constexpr (kAnchor != AnchorFrom::kNothing) add_lanes(gap, sums.gap);
}

struct GradWeights {
  float error, gap;
  float guidance_scale;
};

// `count` is a multiple of kLanes. An error weight of zero drops its term, NaN included; with a gap weight of zero the
// loop without an anchor is taken.
template <TargetFrom kTarget, AnchorFrom kAnchor, class Element>
static inline void write_grad_tile(const TilePlaces<Element>& tile, int64_t count, const GradWeights& weights,
                                   typename Element::Stored* grad) {
  const Lanes scale = splat(weights.guidance_scale);
  const Lanes error_weight = splat(weights.error), gap_weight = splat(weights.gap);
  const Lanes keep_error = splat_bits(weights.error != 0.0f ? 0xFFFFFFFFu : 0u);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Lanes predicted = Element::load_lanes(tile.predicted + i);
    Lanes sum = (error_weight * (predicted - target_lanes<kTarget>(tile, i))) & keep_error;
    if constexpr (kAnchor != AnchorFrom::kNothing) {
      sum = fused(gap_weight, predicted - anchor_lanes<kAnchor>(tile, i, scale), sum);
    }
    Element::store_lanes(masked(sum, tile.mask, i), grad + i);
  }
}

template <class Run>
static inline void with_anchor(AnchorFrom anchor, Run run) {
  switch (anchor) {
    case AnchorFrom::kNothing:
      return run(std::integral_constant<AnchorFrom, AnchorFrom::kNothing>{});
    case AnchorFrom::kStored:
      return run(std::integral_constant<AnchorFrom, AnchorFrom::kStored>{});
    case AnchorFrom::kGuided:
      return run(std::integral_constant<AnchorFrom, AnchorFrom::kGuided>{});
  }
}

// Calls run(target, anchor) with the two as compile-time constants.
template <class Run>
static inline void with_sources(TargetFrom target, AnchorFrom anchor, Run run) {
  with_anchor(anchor, [&](auto fixed_anchor) {
    switch (target) {
      case TargetFrom::kStored:
        return run(std::integral_constant<TargetFrom, TargetFrom::kStored>{}, fixed_anchor);
      case TargetFrom::kNormals:
        return run(std::integral_constant<TargetFrom, TargetFrom::kNormals>{}, fixed_anchor);
      case TargetFrom::kNormalsMinusStored:
        return run(std::integral_constant<TargetFrom, TargetFrom::kNormalsMinusStored>{}, fixed_anchor);
    }
  });
}

static inline TargetFrom target_from(const ResidualArgs& args) {
  switch (args.target_kind) {
    case Target::kTensor:
    case Target::kClean:
      return TargetFrom::kStored;
    case Target::kNoise:
      return TargetFrom::kNormals;
    case Target::kVelocity:
      return TargetFrom::kNormalsMinusStored;
  }
  return TargetFrom::kStored;
}

static inline AnchorFrom anchor_from(const ResidualArgs& args) {
  if (!given(args.ref)) return AnchorFrom::kNothing;
  return given(args.ref_uncond) ? AnchorFrom::kGuided : AnchorFrom::kStored;
}

static inline bool lies_as(const Rows& rows, Dtype dtype) {
  return !given(rows) || (contiguous(rows) && rows.dtype == dtype);
}

// Whether whole tiles can be read where they lie: no mask, all tensors contiguous and of one dtype.
static inline bool lies_plainly(const ResidualArgs& args) {
  const Dtype dtype = args.predicted.dtype;
  return !given(args.mask) && lies_as(args.predicted, dtype) && lies_as(args.old, dtype) &&
         lies_as(args.target, dtype) && lies_as(args.ref, dtype) && lies_as(args.ref_uncond, dtype);
}

template <class Element>
static inline const typename Element::Stored* place(const Rows& rows, int64_t row, int64_t start) {
  return given(rows) ? static_cast<const typename Element::Stored*>(rows.data) + row * rows.row_stride + start : nullptr;
}

template <class Element>
static inline TilePlaces<Element> plain_tile(const ResidualArgs& args, int64_t row, int64_t start) {
  TilePlaces<Element> tile;
  tile.predicted = place<Element>(args.predicted, row, start);
  tile.old = place<Element>(args.old, row, start);
  tile.target = place<Element>(args.target, row, start);
  tile.conditional = place<Element>(args.ref, row, start);
  tile.unconditional = place<Element>(args.ref_uncond, row, start);
  return tile;
}

// Elements [start, start + count) of every tensor as fp32, zero up to the next multiple of kLanes.
static inline TilePlaces<Float32Element> buffered_tile(const ResidualArgs& args, int64_t row, int64_t start,
                                                       int64_t count, TileBuffers& buffers) {
  const auto filled = [&](const Rows& rows, float* buffer) -> const float* {
    if (!given(rows)) return nullptr;
    const float* values = load_tile(rows, row, start, count, buffer);
    if (count % kLanes == 0) return values;
    for (int64_t i = 0; i < count; ++i) buffer[i] = values[i];
    for (int64_t i = count; i % kLanes != 0; ++i) buffer[i] = 0.0f;
    return buffer;
  };
  TilePlaces<Float32Element> tile;
  tile.predicted = filled(args.predicted, buffers.predicted);
  tile.old = filled(args.old, buffers.old);
  tile.target = filled(args.target, buffers.target);
  tile.conditional = filled(args.ref, buffers.conditional);
  tile.unconditional = filled(args.ref_uncond, buffers.unconditional);
  tile.mask = filled(args.mask, buffers.mask);
  return tile;
}

// Calls run(tile, start, count) on every tile of a span: places of `Element`s, or of fp32 where that is not possible;
// beyond `count` they may be read up to the next multiple of kLanes.
template <class Element, TargetFrom kTarget, class Run>
static inline void for_each_tile(const ResidualArgs& args, bool plain, int64_t row, int64_t begin, int64_t end,
                                 Run run) {
  TileBuffers buffers;
  for (int64_t start = begin; start < end; start += kTileElements) {
    const int64_t count = end - start < kTileElements ? end - start : kTileElements;
    if constexpr (kTarget != TargetFrom::kStored) {
      normal_tile(args.source, row, start, buffers.normals);
      for (int64_t i = count; i % kLanes != 0; ++i) buffers.normals[i] = 0.0f;
    }
    if (plain && count % kLanes == 0) {
      TilePlaces<Element> tile = plain_tile<Element>(args, row, start);
      tile.normals = buffers.normals;
      run(tile, start, count);
    } else {
      TilePlaces<Float32Element> tile = buffered_tile(args, row, start, count, buffers);
      tile.normals = buffers.normals;
      run(tile, start, count);
    }
  }
}

// Calls run(Element) with the element type of `dtype`.
template <class Run>
static inline void with_element(Dtype dtype, Run run) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return run(BFloat16Element{});
    case Dtype::kFloat16:
      return run(Float16Element{});
    default:
      return run(Float32Element{});
  }
}

}  // namespace

static inline ResidualSums residual_sums_span(const ResidualArgs& args, int64_t row, int64_t begin, int64_t end) {
  const bool plain = lies_plainly(args);
  TileSums sums;
  with_element(plain ? args.predicted.dtype : Dtype::kFloat32, [&](auto element) {
    with_sources(target_from(args), anchor_from(args), [&](auto target, auto anchor) {
      for_each_tile<decltype(element), target()>(
          args, plain, row, begin, end, [&](const auto& tile, int64_t, int64_t count) {
            if (given(args.old)) {
              add_tile<target(), anchor(), true>(tile, count, args.guidance_scale, sums);
            } else {
              add_tile<target(), anchor(), false>(tile, count, args.guidance_scale, sums);
            }
          });
    });
  });
  return {total(sums.squared), total(sums.absolute), total(sums.gap), total(sums.old_squared),
          total(sums.old_absolute)};
}

static inline void residual_grad_span(const ResidualArgs& args, float error_weight, float gap_weight, const Rows& grad,
                                      int64_t row, int64_t begin, int64_t end) {
  const bool plain = lies_plainly(args) && lies_as(grad, args.predicted.dtype);
  const GradWeights weights{error_weight, gap_weight, args.guidance_scale};
  const AnchorFrom used_anchor = gap_weight == 0.0f ? AnchorFrom::kNothing : anchor_from(args);
  alignas(64) float buffer[kTileElements];
  with_element(plain ? args.predicted.dtype : Dtype::kFloat32, [&](auto element) {
    using Stored = typename decltype(element)::Stored;
    with_sources(target_from(args), used_anchor, [&](auto target, auto anchor) {
      for_each_tile<decltype(element), target()>(
          args, plain, row, begin, end, [&](const auto& tile, int64_t start, int64_t count) {
            if constexpr (std::is_same_v<std::decay_t<decltype(tile)>, TilePlaces<decltype(element)>>) {
              if (plain && count % kLanes == 0) {
                auto* out = static_cast<Stored*>(grad.data) + row * grad.row_stride + start;
                return write_grad_tile<target(), anchor()>(tile, count, weights, out);
              }
            }
            if constexpr (std::is_same_v<std::decay_t<decltype(tile)>, TilePlaces<Float32Element>>) {
              write_grad_tile<target(), anchor()>(tile, count, weights, buffer);
              store_tile(buffer, grad, row, start, count);
            }
          });
    });
  });
}

}  // namespace crd
