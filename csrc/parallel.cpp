#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace crd {
namespace {

inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// A worker that has just worked looks for more this long before it sleeps: waking a sleeper takes as long as a whole
// call, and the next call of a loss comes within it.
constexpr std::chrono::microseconds kWatch{200};
constexpr int kLooksPerClock = 32;

// Looks of a caller at workers that finish their last item, before it offers its processor to them.
constexpr int kLooksBeforeYield = 10000;

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

class Pool {
 public:
  // False when another call is at work: nothing has been done then.
  bool run(Job& job, int64_t helpers) {
    const std::unique_lock<std::mutex> only_one(busy_, std::try_to_lock);
    if (!only_one.owns_lock()) return false;
    const uint64_t places = static_cast<uint64_t>(start_workers(std::min<int64_t>(helpers, kMostPlaces)));
    job_ = &job;
    left_ = 0;
    ++calls_;
    offer_ = calls_ << kPlaceBits | places;
    if (asleep_ > 0) {
      { const std::lock_guard<std::mutex> lock(sleep_mutex_); }  // whoever counted itself asleep waits by now
      wake_.notify_all();
    }
    job.take_items();
    const uint64_t untaken = offer_.exchange(calls_ << kPlaceBits) & kMostPlaces;
    for (int look = 0; left_ != places - untaken; ++look) {
      if (look < kLooksBeforeYield) {
        pause_briefly();
      } else {
        std::this_thread::yield();
      }
    }
    return true;
  }

 private:
  static constexpr int kPlaceBits = 16;
  static constexpr uint64_t kMostPlaces = (uint64_t{1} << kPlaceBits) - 1;

  // How many of `wanted` workers there are.
  int64_t start_workers(int64_t wanted) {
    try {
      for (; workers_ < wanted; ++workers_) std::thread([this] { work(); }).detach();
    } catch (const std::system_error&) {
      // The system refused another thread: those there are do what is left.
    }
    return std::min(wanted, workers_);
  }

  void work() {
    uint64_t seen = 0;
    while (true) {
      wait_for_other_than(seen);
      uint64_t offer = offer_;
      while ((offer & kMostPlaces) != 0 && !offer_.compare_exchange_weak(offer, offer - 1)) {
      }
      seen = offer >> kPlaceBits;
      if ((offer & kMostPlaces) == 0) continue;
      job_->take_items();
      ++left_;
    }
  }

  void wait_for_other_than(uint64_t call) {
    const auto until = std::chrono::steady_clock::now() + kWatch;
    do {
      for (int look = 0; look < kLooksPerClock; ++look) {
        if (offer_ >> kPlaceBits != call) return;
        pause_briefly();
      }
    } while (std::chrono::steady_clock::now() < until);
    std::unique_lock<std::mutex> lock(sleep_mutex_);
    ++asleep_;
    wake_.wait(lock, [&] { return offer_ >> kPlaceBits != call; });
    --asleep_;
  }

  std::mutex busy_;       // held by the call at work, guards the next three
  int64_t workers_ = 0;
  uint64_t calls_ = 0;
  Job* job_ = nullptr;    // read by workers that hold a place
  std::atomic<uint64_t> offer_{0};  // number of the call, and the places at its job that are not taken
  std::atomic<uint64_t> left_{0};   // workers that have left the job
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
  std::atomic<int64_t> asleep_{0};
};

// Never destroyed: its threads sleep in it until the process ends. A forked child has none of them and starts anew.
std::atomic<Pool*> current_pool{nullptr};

Pool& pool() {
  static const bool made = [] {
    current_pool = new Pool;
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { current_pool = new Pool; });
#endif
    return true;
  }();
  static_cast<void>(made);
  return *current_pool;
}

}  // namespace

void parallel_for(int64_t items, int64_t threads, const std::function<void(int64_t)>& run) {
  Job job{run, items};
  const int64_t helpers = std::min(items, threads) - 1;
  if (helpers < 1 || !pool().run(job, helpers)) job.take_items();
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace crd
