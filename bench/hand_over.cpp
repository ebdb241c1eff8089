// Two threads of the kernels' own team write to one cache line in turn.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace {

constexpr int64_t TURNS = 50, BLOCKS = 8;

// Whose turn it is: even the first thread's, odd the other's.
alignas(128) std::atomic<int64_t> turn;

void pass_on(int64_t own, int64_t until) {
  for (int64_t next = own; next < until; next += 2) {
    while (turn.load(std::memory_order_acquire) != next) {
    }
    turn.store(next + 1, std::memory_order_release);
  }
}

}  // namespace

// Nanoseconds one way between thread 0 and the thread that is farthest from it: of each pair the best of a few blocks,
// as a thread may lose its core in one. 0 when there is one thread, or more than cores.
extern "C" double recemb_hand_over(int64_t threads) {
  // The cores of the process: a thread that is bound to one could ask the system for its own alone.
  if (threads > omp_get_num_procs()) return 0;
  double farthest = 0;
#pragma omp parallel num_threads(threads)
  for (int other = 1; other < omp_get_num_threads(); other++) {
    double best = 1e9;
    for (int64_t block = 0; block < BLOCKS; block++) {
#pragma omp single
      turn.store(0);
      const double started = omp_get_wtime();
      if (omp_get_thread_num() == 0) pass_on(0, 2 * TURNS);
      if (omp_get_thread_num() == other) pass_on(1, 2 * TURNS);
      best = std::min(best, 1e9 * (omp_get_wtime() - started) / (2 * TURNS));
#pragma omp barrier
    }
    if (omp_get_thread_num() == 0) farthest = std::max(farthest, best);
  }
  return farthest;
}
