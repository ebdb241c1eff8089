// A stable radix sort of records by an integer key.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>

namespace recemb {

// A key with a 32-bit payload, in one word where the key fits 32 bits.
struct Narrow {
  uint64_t word;
  Narrow() = default;
  Narrow(uint64_t key, int64_t value) : word(key << 32 | static_cast<uint32_t>(value)) {}
  uint64_t key() const { return word >> 32; }
  int32_t value() const { return static_cast<int32_t>(word); }
};

struct Wide {
  uint64_t word;
  int64_t at;
  Wide() = default;
  Wide(uint64_t key, int64_t value) : word(key), at(value) {}
  uint64_t key() const { return word; }
  int32_t value() const { return static_cast<int32_t>(at); }
};

inline int bits_of(uint64_t most) { return most ? 64 - __builtin_clzll(most) : 0; }

constexpr int SORT_BITS = 12;  // of one pass at most

// Sorts the n records that read(i) makes, whose keys have at most `bits` bits, in passes of at most SORT_BITS; returns
// where the result is, `a` or `b`. What is read may lie in `b`. By one thread alone, or by all threads of a parallel
// region, each on its share of the records: `counts` then has room for threads << SORT_BITS numbers, and every thread
// returns the same.
template <class Record, class Read>
Record* radix_sort(Read read, Record* a, Record* b, int64_t n, int bits, int32_t* counts = nullptr, int thread = 0,
                   int threads = 1) {
  int passes = (bits + SORT_BITS - 1) / SORT_BITS;
  const auto width_of = [bits](int p) { return (bits + p - 1) / p; };
  // A pass takes longer over its counters than over few records.
  while (passes > 0 && width_of(passes) > 6 && int64_t{1} << width_of(passes) > n) passes++;
  const int64_t begin = n * thread / threads, end = n * (thread + 1) / threads;
  if (n < 2 || passes == 0) {
    for (int64_t i = begin; i < end; i++) a[i] = read(i);
    return a;
  }
  const int width = width_of(passes);
  const int64_t buckets = int64_t{1} << width;
  const uint64_t mask = buckets - 1;
  const auto sort_by = [&](int shift, auto from, Record* to) {
    // On the stack: a shared library looks a thread's own variable up with a call, in every step of a loop.
    int32_t count[1 << SORT_BITS];
    std::fill(count, count + buckets, 0);
    for (int64_t i = begin; i < end; i++) count[(from(i).key() >> shift) & mask]++;
    int32_t before = 0;
    if (threads == 1) {
      for (int64_t d = 0; d < buckets; d++) before += std::exchange(count[d], before);
    } else {
      std::copy(count, count + buckets, counts + thread * buckets);
#pragma omp barrier
      for (int64_t d = 0; d < buckets; d++)
        for (int t = 0; t < threads; t++) {
          if (t == thread) count[d] = before;
          before += counts[t * buckets + d];
        }
    }
    for (int64_t i = begin; i < end; i++) {
      const Record record = from(i);
      to[count[(record.key() >> shift) & mask]++] = record;
    }
    if (threads > 1) {
#pragma omp barrier
    }
  };
  sort_by(0, read, a);
  for (int p = 1; p < passes; p++) {
    sort_by(p * width, [a](int64_t i) { return a[i]; }, b);
    std::swap(a, b);
  }
  return a;
}

}  // namespace recemb
