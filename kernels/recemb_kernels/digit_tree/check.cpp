// What a batch has to be before anything is done with it.
#include <omp.h>

#include <cmath>
#include <cstdint>

// Numbers from which several threads look at them.
constexpr int64_t SHARED = int64_t{1} << 14;

extern "C" {

// 0 when offsets rise from 0 to `num_ids`, every feature's ids are in [0, limits[f]) and weights are finite.
int64_t recemb_tree_check(const int64_t* ids, const int64_t* offsets, const float* weights, int64_t num_ids,
                          int64_t num_features, int64_t batch, const int64_t* limits, int64_t threads) {
  const int64_t bags = num_features * batch;  // `limits` null: ids are not looked at
  if (offsets[0] != 0 || offsets[bags] != num_ids) return 1;
  int64_t bad = 0;
#pragma omp parallel num_threads(num_ids + bags < SHARED ? 1 : threads) reduction(| : bad)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < bags; i++) bad |= offsets[i + 1] < offsets[i];
  }
  if (bad) return 1;
#pragma omp parallel num_threads(num_ids < SHARED ? 1 : threads) reduction(| : bad)
  {
    for (int64_t f = 0; limits && f < num_features; f++) {
      const uint64_t limit = static_cast<uint64_t>(limits[f]);
#pragma omp for schedule(static) nowait
      for (int64_t i = offsets[f * batch]; i < offsets[(f + 1) * batch]; i++)
        bad |= static_cast<uint64_t>(ids[i]) >= limit;
    }
    if (weights) {
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < num_ids; i++) bad |= !std::isfinite(weights[i]);
    }
  }
  return bad;
}
}
