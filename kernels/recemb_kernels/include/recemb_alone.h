// Slices and parts of a table, each of which one thread takes alone, or all together.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "recemb_tree.h"

namespace recemb {

// Tasks that a thread chooses the next one from.
constexpr int64_t CHOICE = 16;

// Shares few large tasks [0, count) among the threads of a region; `taken` has room for a number of each. A thread takes
// those of its share, of which it may have more in its cache than others, then what they have left; of the next ones of
// either the largest first, so that all end together: cost(k) is task k's. A barrier follows.
template <class Cost, class Act>
void share_large_tasks(int64_t count, int32_t* taken, Cost cost, Act act) {
  const int64_t me = omp_get_thread_num(), threads = omp_get_num_threads();
#pragma omp single
  std::fill_n(taken, count, 0);
  const auto largest = [&](int64_t first, int64_t last) {
    int64_t found = -1;
    for (int64_t k = first, seen = 0; k < last && seen < CHOICE; k++) {
      if (__atomic_load_n(taken + k, __ATOMIC_RELAXED)) continue;
      if (seen++ == 0 || cost(k) > cost(found)) found = k;
    }
    return found;
  };
  for (int64_t k;;) {
    k = largest(me * count / threads, (me + 1) * count / threads);
    if (k < 0 && (k = largest(0, count)) < 0) break;
    if (!__atomic_exchange_n(taken + k, 1, __ATOMIC_RELAXED)) act(k);
  }
#pragma omp barrier
}

// Calls act(call, worker, k) for every slice or part k < count: each on one thread, within a region of its own, or one
// after the other on all threads together.
template <class Cost, class Act>
void each_alone(const Table& table, const Call& call, int64_t count, Cost cost, Act act) {
  if (table.workers == 1) {
    for (int64_t k = 0; k < count; k++) act(&call, 0, k);
    return;
  }
  const int64_t me = omp_get_thread_num();
  Call own = call;
  own.own += me * call.own_stride;
  // The first level has no runs.
  share_large_tasks(count, const_cast<int32_t*>(table.level[0].past_run), cost, [&](int64_t k) {
#pragma omp parallel num_threads(1)
    act(&own, me, k);
  });
}

}  // namespace recemb
