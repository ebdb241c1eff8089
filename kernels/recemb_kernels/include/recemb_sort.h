// A stable radix sort of keys with a 32-bit payload.
#pragma once
#include <cstdint>
#include <vector>

namespace recemb {

// Sorts (key, value) pairs by key, stable, in passes of 11 bits; only the bits that `top` has are visited.
inline void radix_sort(std::vector<int64_t>& key, std::vector<int32_t>& value, int64_t top) {
  constexpr int BITS = 11, BUCKETS = 1 << BITS;
  const int64_t n = static_cast<int64_t>(key.size());
  if (n < 2) return;
  std::vector<int64_t> key2(n);
  std::vector<int32_t> value2(n);
  for (int shift = 0; shift < 63 && (top >> shift) > 0; shift += BITS) {
    int64_t count[BUCKETS] = {};
    for (int64_t i = 0; i < n; i++) count[(key[i] >> shift) & (BUCKETS - 1)]++;
    int64_t at = 0;
    for (int b = 0; b < BUCKETS; b++) {
      const int64_t here = count[b];
      count[b] = at;
      at += here;
    }
    for (int64_t i = 0; i < n; i++) {
      const int64_t to = count[(key[i] >> shift) & (BUCKETS - 1)]++;
      key2[to] = key[i];
      value2[to] = value[i];
    }
    key.swap(key2);
    value.swap(value2);
  }
}

}  // namespace recemb
