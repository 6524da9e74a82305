// How a batch of rows is cut into pieces of work. The cuts depend on the sizes alone, never on the number of threads,
// so neither does a sum over them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "normal_tile.h"
#include "parallel.h"

namespace crd {

// Some microseconds of work, so that handing it out costs nothing beside it; a multiple of the tile.
constexpr int64_t kSpanElements = 64 * kTileElements;

inline int64_t spans_per_row(int64_t dim) { return (dim + kSpanElements - 1) / kSpanElements; }

// Calls run(row, begin, end) for every span [begin, end) of every row, on at most `threads` threads.
template <class Run>
void for_each_span(int64_t batch, int64_t dim, int64_t threads, const Run& run) {
  const int64_t spans = spans_per_row(dim);
  // Rows shorter than a span are handed out in groups, so that a group is about one span of work.
  const int64_t rows_per_item = dim == 0 ? 1 : std::max<int64_t>(1, kSpanElements / dim);
  const int64_t row_groups = (batch + rows_per_item - 1) / rows_per_item;
  parallel_for(row_groups * spans, threads, [&](int64_t item) {
    const int64_t begin = item % spans * kSpanElements;
    const int64_t end = std::min(dim, begin + kSpanElements);
    const int64_t first_row = item / spans * rows_per_item;
    const int64_t last_row = std::min(batch, first_row + rows_per_item);
    for (int64_t row = first_row; row < last_row; ++row) run(row, begin, end);
  });
}

}  // namespace crd
