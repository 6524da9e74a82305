// A batch of samples in memory: rows of `dim` elements each, in any layout, read and written a tile at a time as fp32.
//
// Elements are counted in the logical, row-major order of a sample, whatever their order in memory: the noise of an
// element depends on that number.
#pragma once

#include <cstdint>

#include "element.h"
#include "lanes.h"

namespace crd {

constexpr int kMaxRowAxes = 8;

// `axes` nested axes, outermost first, neighbours that are contiguous in each other merged; a contiguous row has one of
// stride 1. Strides are in elements and may be 0 (a broadcast axis).
struct Rows {
  void* data = nullptr;  // null: this tensor was not given
  Dtype dtype = Dtype::kFloat32;
  int64_t row_stride = 0;
  int axes = 0;
  int64_t sizes[kMaxRowAxes] = {};
  int64_t strides[kMaxRowAxes] = {};
};

static inline bool given(const Rows& rows) { return rows.data != nullptr; }
static inline bool contiguous(const Rows& rows) { return rows.axes == 1 && rows.strides[0] == 1; }

namespace {  // for the reason given in philox.h

struct Float32Element {
  using Stored = float;
  static constexpr Dtype kDtype = Dtype::kFloat32;
  static inline float load(float stored) { return stored; }
  static inline float store(float value) { return value; }
  static inline Lanes load_lanes(const float* source) { return crd::load_lanes(source); }
  static inline void store_lanes(Lanes values, float* target) { crd::store_lanes(values, target); }
};

struct BFloat16Element {
  using Stored = uint16_t;
  static constexpr Dtype kDtype = Dtype::kBFloat16;
  static inline float load(uint16_t stored) { return from_bfloat16(stored); }
  static inline uint16_t store(float value) { return to_bfloat16(value); }
  static inline Lanes load_lanes(const uint16_t* source) { return load_bfloat16(source); }
  static inline void store_lanes(Lanes values, uint16_t* target) { store_bfloat16(values, target); }
};

struct Float16Element {
  using Stored = uint16_t;
  static constexpr Dtype kDtype = Dtype::kFloat16;
  static inline float load(uint16_t stored) { return from_float16(stored); }
  static inline uint16_t store(float value) { return to_float16(value); }
  static inline Lanes load_lanes(const uint16_t* source) { return load_float16(source); }
  static inline void store_lanes(Lanes values, uint16_t* target) { store_float16(values, target); }
};

// A bool: all bits of the fp32 word are set where it is true, so that a value is kept or dropped by a bitwise and.
struct MaskElement {
  using Stored = uint8_t;
  static inline float load(uint8_t stored) { return float_of(0u - static_cast<uint32_t>(stored != 0)); }
};

}  // namespace

// Calls run(offset, stride, done, length) on the pieces of elements [start, start + count) that lie along one innermost
// axis: `offset` from the row's first element, `done` elements after `start`.
template <class Run>
static inline void for_each_run(const Rows& rows, int64_t start, int64_t count, Run run) {
  int64_t place[kMaxRowAxes];
  int64_t rest = start, offset = 0;
  for (int axis = rows.axes - 1; axis >= 0; --axis) {
    place[axis] = rest % rows.sizes[axis];
    rest /= rows.sizes[axis];
    offset += place[axis] * rows.strides[axis];
  }
  const int inner = rows.axes - 1;
  for (int64_t done = 0; done < count;) {
    const int64_t left = rows.sizes[inner] - place[inner];
    const int64_t length = left < count - done ? left : count - done;
    run(offset, rows.strides[inner], done, length);
    done += length;
    place[inner] += length;
    offset += length * rows.strides[inner];
    for (int axis = inner; axis > 0 && place[axis] == rows.sizes[axis]; --axis) {
      offset += rows.strides[axis - 1] - rows.sizes[axis] * rows.strides[axis];
      place[axis] = 0;
      ++place[axis - 1];
    }
  }
}

template <class Element>
static inline void load_elements(const Rows& rows, int64_t row, int64_t start, int64_t count, float* values) {
  const auto* source = static_cast<const typename Element::Stored*>(rows.data) + row * rows.row_stride;
  if (contiguous(rows)) {
    source += start;
    for (int64_t i = 0; i < count; ++i) values[i] = Element::load(source[i]);
    return;
  }
  for_each_run(rows, start, count, [&](int64_t offset, int64_t stride, int64_t done, int64_t length) {
    for (int64_t i = 0; i < length; ++i) values[done + i] = Element::load(source[offset + i * stride]);
  });
}

template <class Element>
static inline void store_elements(const float* values, const Rows& rows, int64_t row, int64_t start, int64_t count) {
  auto* target = static_cast<typename Element::Stored*>(rows.data) + row * rows.row_stride;
  if (contiguous(rows)) {
    target += start;
    for (int64_t i = 0; i < count; ++i) target[i] = Element::store(values[i]);
    return;
  }
  for_each_run(rows, start, count, [&](int64_t offset, int64_t stride, int64_t done, int64_t length) {
    for (int64_t i = 0; i < length; ++i) target[offset + i * stride] = Element::store(values[done + i]);
  });
}

// Elements [start, start + count) of a row, where they lie if that is fp32 already, else converted into `buffer`.
static inline const float* load_tile(const Rows& rows, int64_t row, int64_t start, int64_t count, float* buffer) {
  switch (rows.dtype) {
    case Dtype::kFloat32:
      if (contiguous(rows)) return static_cast<const float*>(rows.data) + row * rows.row_stride + start;
      load_elements<Float32Element>(rows, row, start, count, buffer);
      break;
    case Dtype::kBFloat16:
      load_elements<BFloat16Element>(rows, row, start, count, buffer);
      break;
    case Dtype::kFloat16:
      load_elements<Float16Element>(rows, row, start, count, buffer);
      break;
    case Dtype::kMask:
      load_elements<MaskElement>(rows, row, start, count, buffer);
      break;
  }
  return buffer;
}

static inline void store_tile(const float* values, const Rows& rows, int64_t row, int64_t start, int64_t count) {
  switch (rows.dtype) {
    case Dtype::kFloat32:
      return store_elements<Float32Element>(values, rows, row, start, count);
    case Dtype::kBFloat16:
      return store_elements<BFloat16Element>(values, rows, row, start, count);
    case Dtype::kFloat16:
      return store_elements<Float16Element>(values, rows, row, start, count);
    case Dtype::kMask:
      return;  // nothing writes masks
  }
}

}  // namespace crd
