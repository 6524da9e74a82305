#include "parallel.h"

#include <algorithm>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace crd {

void parallel_for(int64_t items, int64_t threads, const std::function<void(int64_t, int64_t)>& run) {
  const int64_t parts = std::max<int64_t>(1, std::min(items, threads));
  const auto bound = [&](int64_t part) { return items / parts * part + std::min(items % parts, part); };
  std::vector<std::exception_ptr> errors(static_cast<size_t>(parts));
  const auto guarded = [&](int64_t part) {
    try {
      run(bound(part), bound(part + 1));
    } catch (...) {
      errors[static_cast<size_t>(part)] = std::current_exception();
    }
  };
  std::vector<std::thread> workers;
  workers.reserve(static_cast<size_t>(parts));
  int64_t started = 0;
  try {
    for (; started < parts - 1; ++started) workers.emplace_back(guarded, started);
  } catch (const std::system_error&) {
    // The system refused another thread: the caller's thread does what is left.
  }
  for (int64_t part = started; part < parts; ++part) guarded(part);
  for (std::thread& worker : workers) worker.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace crd
