// Splits independent work items over threads.
#pragma once

#include <cstdint>
#include <functional>

namespace crd {

// Calls run(begin, end) on consecutive ranges that cover [0, items), one range per thread, the last on the caller's
// thread. The first exception thrown by a range is rethrown once all threads have ended.
void parallel_for(int64_t items, int64_t threads, const std::function<void(int64_t, int64_t)>& run);

}  // namespace crd
