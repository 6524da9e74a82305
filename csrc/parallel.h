// Splits independent work items over threads.
#pragma once

#include <cstdint>
#include <functional>

namespace crd {

// Calls run(item) once for every item of [0, items), on the caller's thread and up to `threads` - 1 others; who takes
// which item is not determined. The first exception thrown is rethrown once every thread has left.
void parallel_for(int64_t items, int64_t threads, const std::function<void(int64_t)>& run);

// To be called in a child of a process that forked before it loaded this library; later forks are noticed.
void after_fork();

}  // namespace crd
