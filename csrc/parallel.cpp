#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#define CRD_POSIX
#endif

namespace crd {
namespace {

struct Job {
  const std::function<void(int64_t)>& run;
  int64_t items;
  std::atomic<int64_t> next{0};
  std::mutex error_mutex{};
  std::exception_ptr error{};

  void take_items() {
    for (int64_t item = next++; item < items; item = next++) {
      try {
        run(item);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(error_mutex);
        if (!error) error = std::current_exception();
      }
    }
  }
};

// The entry into a parallel region of the OpenMP runtime that is in the process already, PyTorch's. Its threads are
// awake after PyTorch's own operations, and a second set of them would take their processors.
using OpenMpParallel = void (*)(void (*run)(void*), void* data, unsigned threads, unsigned flags);

#if defined(CRD_POSIX)
std::atomic<bool> forked{false};

OpenMpParallel find_openmp() {
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
  return reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
}

// Null in a forked child: the runtime's threads stayed with the parent, and a region would wait for them forever.
OpenMpParallel openmp() {
  static const OpenMpParallel found = find_openmp();
  return forked ? nullptr : found;
}
#else
std::atomic<bool> forked{false};
OpenMpParallel openmp() { return nullptr; }
#endif

void run_on_new_threads(Job& job, int64_t threads) {
  std::vector<std::thread> helpers;
  try {
    while (static_cast<int64_t>(helpers.size()) < threads - 1) helpers.emplace_back([&job] { job.take_items(); });
  } catch (const std::system_error&) {
    // The system refused another thread: those there are do what is left.
  }
  job.take_items();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace

void after_fork() { forked = true; }

void parallel_for(int64_t items, int64_t threads, const std::function<void(int64_t)>& run) {
  Job job{run, items};
  const int64_t wanted = std::min(items, threads);
  if (wanted <= 1) {
    job.take_items();
  } else if (const OpenMpParallel parallel = openmp()) {
    parallel([](void* data) { static_cast<Job*>(data)->take_items(); }, &job, static_cast<unsigned>(wanted), 0);
  } else {
    run_on_new_threads(job, wanted);
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace crd
