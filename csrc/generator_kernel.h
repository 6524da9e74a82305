// The loops of DIDR's generator stage, compiled once per instruction set (kernels_*.cpp); sums and tiles as in
// residual_kernel.h.
//
// Every product is rounded before it is subtracted, as the plain formulas do: the two loops, and every build of them,
// get the same bits.
#pragma once

#include <algorithm>
#include <type_traits>

#include "generator.h"
#include "residual_kernel.h"

namespace crd {
namespace {

// What of |x0 - x0_ref| is read.
enum class Distance { kNone, kOfEstimate, kOfPrediction };

// Where the elements of a tile are. Pointers that a loop does not read are null.
template <class Element>
struct GeneratorPlaces {
  const typename Element::Stored* ta = nullptr;
  const typename Element::Stored* conditional = nullptr;
  const typename Element::Stored* unconditional = nullptr;
  const typename Element::Stored* score = nullptr;
  const typename Element::Stored* x0 = nullptr;
  const typename Element::Stored* x_t = nullptr;
};

struct GeneratorBuffers {
  alignas(64) float ta[kTileElements];
  alignas(64) float conditional[kTileElements];
  alignas(64) float unconditional[kTileElements];
  alignas(64) float score[kTileElements];
  alignas(64) float x0[kTileElements];
  alignas(64) float x_t[kTileElements];
};

struct GeneratorTileSums {
  double distance[kLanes] = {}, gap[kLanes] = {}, correction[kLanes] = {}, difference[kLanes] = {}, valid[kLanes] = {};
};

// The numbers of a row.
struct GeneratorFactors {
  float extra_guidance, slope, level, shift;
};

struct GeneratorTerms {
  Lanes guided, gap, correction, difference;
};

static inline GeneratorFactors factors_of(const GeneratorArgs& args, int64_t row) {
  return {args.extra_guidance, args.slope[row], args.level[row], args.shift == nullptr ? 0.0f : args.shift[row]};
}

template <bool kGuided, class Element>
static inline GeneratorTerms generator_terms(const GeneratorPlaces<Element>& tile, int64_t i,
                                             const GeneratorFactors& factors) {
  GeneratorTerms terms;
  terms.guided = Element::load_lanes(tile.conditional + i);
  if constexpr (kGuided) {
    const Lanes apart = terms.guided - Element::load_lanes(tile.unconditional + i);
    terms.guided = fused(splat(factors.extra_guidance), apart, terms.guided);
  }
  terms.gap = splat(factors.slope) * (Element::load_lanes(tile.ta + i) - terms.guided);
  terms.correction = splat(factors.level) * Element::load_lanes(tile.score + i);
  terms.difference = terms.gap - terms.correction;
  return terms;
}

// `count` is a multiple of kLanes.
template <bool kGuided, Distance kDistance, class Element>
static inline void add_generator_tile(const GeneratorPlaces<Element>& tile, int64_t count,
                                      const GeneratorFactors& factors, GeneratorTileSums& sums) {
  const Lanes zero = splat(0.0f), one = splat(1.0f);
  Lanes distance = zero, gap = zero, correction = zero, difference = zero, valid_count = zero;
  for (int64_t i = 0; i < count; i += kLanes) {
    fetch_ahead<Element>(tile.ta + i);
    fetch_ahead<Element>(tile.conditional + i);
    fetch_ahead<Element>(tile.score + i);
    if constexpr (kGuided) fetch_ahead<Element>(tile.unconditional + i);
    if constexpr (kDistance != Distance::kNone) fetch_ahead<Element>(tile.x0 + i);
    if constexpr (kDistance == Distance::kOfPrediction) fetch_ahead<Element>(tile.x_t + i);
    const GeneratorTerms terms = generator_terms<kGuided>(tile, i, factors);
    const Lanes valid = finite(terms.difference);
    const Lanes kept_gap = terms.gap & valid, kept_correction = terms.correction & valid;
    const Lanes kept_difference = terms.difference & valid;
    gap = fused(kept_gap, kept_gap, gap);
    correction = fused(kept_correction, kept_correction, correction);
    difference = fused(kept_difference, kept_difference, difference);
    valid_count = valid_count + (one & valid);
    if constexpr (kDistance != Distance::kNone) {
      Lanes estimate = splat(factors.slope) * terms.guided;
      if constexpr (kDistance == Distance::kOfPrediction) {
        estimate = fused(splat(factors.shift), Element::load_lanes(tile.x_t + i), estimate);
      }
      distance = distance + (absolute(Element::load_lanes(tile.x0 + i) - estimate) & valid);
    }
  }
  add_lanes(gap, sums.gap);
  add_lanes(correction, sums.correction);
  add_lanes(difference, sums.difference);
  add_lanes(valid_count, sums.valid);
  if constexpr (kDistance != Distance::kNone) add_lanes(distance, sums.distance);
}

// `count` is a multiple of kLanes.
template <bool kGuided, class Element>
static inline void write_generator_tile(const GeneratorPlaces<Element>& tile, int64_t count,
                                        const GeneratorFactors& factors, float scale, float upstream,
                                        typename Element::Stored* gradient) {
  const Lanes wanted = splat_bits(scale != 0.0f ? 0xFFFFFFFFu : 0u);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Lanes g = splat(scale) * generator_terms<kGuided>(tile, i, factors).difference;
    Element::store_lanes((splat(upstream) * g) & finite(g) & wanted, gradient + i);
  }
}

static inline Distance distance_of(const GeneratorArgs& args) {
  if (!given(args.x0)) return Distance::kNone;
  return given(args.x_t) ? Distance::kOfPrediction : Distance::kOfEstimate;
}

// Calls run(guided) with it as a compile-time constant.
template <class Run>
static inline void with_guidance(const GeneratorArgs& args, Run run) {
  if (given(args.ref_uncond)) return run(std::true_type{});
  run(std::false_type{});
}

template <class Run>
static inline void with_distance(const GeneratorArgs& args, Run run) {
  switch (distance_of(args)) {
    case Distance::kNone:
      return run(std::integral_constant<Distance, Distance::kNone>{});
    case Distance::kOfEstimate:
      return run(std::integral_constant<Distance, Distance::kOfEstimate>{});
    case Distance::kOfPrediction:
      return run(std::integral_constant<Distance, Distance::kOfPrediction>{});
  }
}

// Whether whole tiles can be read where they lie: all tensors contiguous and of one dtype.
static inline bool lies_plainly(const GeneratorArgs& args) {
  const Dtype dtype = args.ta.dtype;
  return lies_as(args.ta, dtype) && lies_as(args.ref, dtype) && lies_as(args.ref_uncond, dtype) &&
         lies_as(args.s_r, dtype) && lies_as(args.x0, dtype) && lies_as(args.x_t, dtype);
}

template <class Element>
static inline GeneratorPlaces<Element> plain_tile_of(const GeneratorArgs& args, int64_t row, int64_t start) {
  GeneratorPlaces<Element> tile;
  tile.ta = place<Element>(args.ta, row, start);
  tile.conditional = place<Element>(args.ref, row, start);
  tile.unconditional = place<Element>(args.ref_uncond, row, start);
  tile.score = place<Element>(args.s_r, row, start);
  tile.x0 = place<Element>(args.x0, row, start);
  tile.x_t = place<Element>(args.x_t, row, start);
  return tile;
}

// Elements [start, start + count) of every tensor as fp32, zero up to the next multiple of kLanes.
static inline GeneratorPlaces<Float32Element> buffered_tile(const GeneratorArgs& args, int64_t row, int64_t start,
                                                            int64_t count, GeneratorBuffers& buffers) {
  const auto filled = [&](const Rows& rows, float* buffer) -> const float* {
    if (!given(rows)) return nullptr;
    const float* values = load_tile(rows, row, start, count, buffer);
    if (count % kLanes == 0) return values;
    for (int64_t i = 0; i < count; ++i) buffer[i] = values[i];
    for (int64_t i = count; i % kLanes != 0; ++i) buffer[i] = 0.0f;
    return buffer;
  };
  GeneratorPlaces<Float32Element> tile;
  tile.ta = filled(args.ta, buffers.ta);
  tile.conditional = filled(args.ref, buffers.conditional);
  tile.unconditional = filled(args.ref_uncond, buffers.unconditional);
  tile.score = filled(args.s_r, buffers.score);
  tile.x0 = filled(args.x0, buffers.x0);
  tile.x_t = filled(args.x_t, buffers.x_t);
  return tile;
}

static inline int64_t whole_lanes(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Calls run(tile, start, count, plain) on every tile of a span; beyond `count` they may be read up to the next multiple
// of kLanes. plain (a compile-time constant): `tile` is where the tensors lie, of `Element`s.
template <class Element, class Run>
static inline void for_each_tile(const GeneratorArgs& args, bool plain, int64_t row, int64_t begin, int64_t end,
                                 Run run) {
  GeneratorBuffers buffers;
  for (int64_t start = begin; start < end; start += kTileElements) {
    const int64_t count = end - start < kTileElements ? end - start : kTileElements;
    if (plain && count % kLanes == 0) {
      run(plain_tile_of<Element>(args, row, start), start, count, std::true_type{});
    } else {
      run(buffered_tile(args, row, start, count, buffers), start, count, std::false_type{});
    }
  }
}

}  // namespace

static inline GeneratorSums generator_sums_span(const GeneratorArgs& args, int64_t row, int64_t begin, int64_t end) {
  const bool plain = lies_plainly(args);
  const GeneratorFactors factors = factors_of(args, row);
  GeneratorTileSums sums;
  int64_t read = 0;
  with_element(plain ? args.ta.dtype : Dtype::kFloat32, [&](auto element) {
    with_guidance(args, [&](auto guided) {
      with_distance(args, [&](auto distance) {
        for_each_tile<decltype(element)>(
            args, plain, row, begin, end, [&](const auto& tile, int64_t, int64_t count, auto) {
              add_generator_tile<guided(), distance()>(tile, count, factors, sums);
              read += whole_lanes(count);
            });
      });
    });
  });
  // The zeros that fill up a tile add nothing, and are valid unless a factor makes every element invalid.
  const int64_t invalid = std::min(end - begin, read - static_cast<int64_t>(total(sums.valid)));
  return {total(sums.distance), total(sums.gap), total(sums.correction), total(sums.difference), invalid};
}

static inline void generator_gradient_span(const GeneratorArgs& args, float scale, float upstream,
                                           const Rows& gradient, int64_t row, int64_t begin, int64_t end) {
  const bool plain = lies_plainly(args) && lies_as(gradient, args.ta.dtype);
  const GeneratorFactors factors = factors_of(args, row);
  alignas(64) float buffer[kTileElements];
  with_element(plain ? args.ta.dtype : Dtype::kFloat32, [&](auto element) {
    using Stored = typename decltype(element)::Stored;
    with_guidance(args, [&](auto guided) {
      for_each_tile<decltype(element)>(
          args, plain, row, begin, end, [&](const auto& tile, int64_t start, int64_t count, auto lies) {
            if constexpr (lies()) {
              auto* out = static_cast<Stored*>(gradient.data) + row * gradient.row_stride + start;
              write_generator_tile<guided()>(tile, count, factors, scale, upstream, out);
            } else {
              write_generator_tile<guided()>(tile, count, factors, scale, upstream, buffer);
              store_tile(buffer, gradient, row, start, count);
            }
          });
    });
  });
}

}  // namespace crd
