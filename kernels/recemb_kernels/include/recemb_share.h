// Sharing out a pass among the threads of the driver's region.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace recemb {

// Tasks that a thread takes at once: handing one out costs 50 ns between two cores, as much as a small one takes, and
// sixteen shares a thread still even out.
static inline int64_t tasks_at_once(int64_t tasks) {
  return std::max<int64_t>(1, tasks / (16 * omp_get_num_threads()));
}

// Shares tasks [first, last) among the threads of a region; no barrier follows. The first three quarters of their cost
// are cut into one run of tasks a thread, so that passes over the same digits, and the next step, find much of what
// they read in the cache of the thread that had it last. The rest goes to whoever is free. cost(i): of tasks before i.
template <class Cost, class Act>
void share_tasks(int64_t first, int64_t last, Cost cost, Act act) {
  const int64_t me = omp_get_thread_num(), threads = omp_get_num_threads();
  const int64_t before = cost(first), owned = (cost(last) - before) / 4 * 3;
  const auto cut = [&](int64_t shares) {
    int64_t low = first, high = last;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (cost(middle) - before < owned * shares / threads)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  // One place that calls it, and a copy that nothing points to: a loop that holds in registers what tasks read.
  const auto take = [&act](int64_t begin, int64_t end) __attribute__((noinline)) {
    const Act own = act;
    for (int64_t i = begin; i < end; i++) own(i);
  };
  take(cut(me), cut(me + 1));
  const int64_t rest = cut(threads), at_once = tasks_at_once(last - rest);
#pragma omp for schedule(dynamic) nowait
  for (int64_t i = rest; i < last; i += at_once) take(i, std::min(i + at_once, last));
}

}  // namespace recemb
