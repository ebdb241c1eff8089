// A stable radix sort of records by an integer key.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

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

// Passes over n keys of at most `bits` bits, of at most SORT_BITS each. One takes longer over its counters than over a
// few records.
inline int sort_passes(int64_t n, int bits) {
  int passes = (bits + SORT_BITS - 1) / SORT_BITS;
  for (int width; n > 1 && passes && (width = (bits + passes - 1) / passes) > 6 && int64_t{1} << width > n;) passes++;
  return passes;
}

// Sorts the n records that read(i) makes, whose keys have at most `bits` bits, into `a` in an odd number of passes or
// none, into `b` in an even one; returns which. What is read may lie in `b`.
template <class Record, class Read>
Record* radix_sort(Read read, Record* a, Record* b, int64_t n, int bits) {
  const int passes = sort_passes(n, bits);
  if (n < 2 || passes == 0) {
    for (int64_t i = 0; i < n; i++) a[i] = read(i);
    return a;
  }
  const int width = (bits + passes - 1) / passes;
  const int64_t buckets = int64_t{1} << width;
  const uint64_t mask = buckets - 1;
  const auto sort_by = [&](int shift, auto from, Record* to) {
    // On the stack: a shared library looks a thread's own variable up with a call, in every step of a loop.
    int32_t count[1 << SORT_BITS];
    std::fill(count, count + buckets, 0);
    for (int64_t i = 0; i < n; i++) count[(from(i).key() >> shift) & mask]++;
    int32_t before = 0;
    for (int64_t d = 0; d < buckets; d++) before += std::exchange(count[d], before);
    for (int64_t i = 0; i < n; i++) {
      const Record record = from(i);
      to[count[(record.key() >> shift) & mask]++] = record;
    }
  };
  sort_by(0, read, a);
  for (int p = 1; p < passes; p++) {
    sort_by(p * width, [a](int64_t i) { return a[i]; }, b);
    std::swap(a, b);
  }
  return a;
}

// Appends those of the records read(begin) .. read(end - 1) whose keys lie in [low, low + width) to `to`; returns their
// end. Which do cannot be predicted, so there is no branch, and nothing is written behind them.
template <class Record, class Read>
Record* select_keys(Read read, int64_t begin, int64_t end, uint64_t low, uint64_t width, Record* to) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Record) == sizeof(uint64_t)) {
    constexpr int64_t LANES = 8, AT_ONCE = 64;
    const auto all = [](uint64_t x) { return _mm512_set1_epi64(static_cast<int64_t>(x)); };
    const __m512i from = all(low), wide = all(width);
    for (; begin + AT_ONCE <= end; begin += AT_ONCE) {
      // A loop of its own, and a long one, is what compilers make vectors of.
      alignas(64) uint64_t words[AT_ONCE];
      for (int64_t i = 0; i < AT_ONCE; i++) words[i] = read(begin + i).word;
      for (int64_t i = 0; i < AT_ONCE; i += LANES) {
        const __m512i records = _mm512_load_si512(words + i), keys = _mm512_srli_epi64(records, 32);
        const __mmask8 mine = _mm512_cmplt_epu64_mask(_mm512_sub_epi64(keys, from), wide);
        const int count = __builtin_popcount(mine);
        const __mmask8 first = static_cast<__mmask8>((1u << count) - 1);
        _mm512_mask_storeu_epi64(to, first, _mm512_maskz_compress_epi64(mine, records));
        to += count;
      }
    }
  }
#endif
  Record none;
  uintptr_t at = reinterpret_cast<uintptr_t>(to);
  const uintptr_t nowhere = reinterpret_cast<uintptr_t>(&none);
  for (; begin < end; begin++) {
    const Record record = read(begin);
    const uintptr_t mine = record.key() - low < width;
    *reinterpret_cast<Record*>(nowhere ^ ((nowhere ^ at) & -mine)) = record;
    at += mine * sizeof(Record);
  }
  return reinterpret_cast<Record*>(at);
}

// Finds the runs of equal numbers among number(0) .. number(n - 1), none of which is 2^64 - 1, and returns how many
// there are: distinct[r] is run r's number, begin[r] its first i, begin[runs] is n, and run[i], unless null, the run of i.
// `distinct` may take the numbers' place. Where a run ends cannot be predicted, so there is no branch.
template <class Number>
int64_t find_runs(Number number, int64_t n, uint64_t* distinct, int32_t* begin, int32_t* run) {
  int64_t runs = 0, i = 0;
  uint64_t before = ~uint64_t{0};
  begin[0] = 0;
#if defined(__AVX512F__) && defined(__BMI2__)
  constexpr int64_t AT_ONCE = 8;
  constexpr uint64_t BYTES = 0x0101010101010101;
  const __m512i lanes = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  __m512i last = _mm512_set1_epi64(-1);
  for (; i + AT_ONCE <= n; i += AT_ONCE) {
    uint64_t numbers[AT_ONCE];
    for (int64_t k = 0; k < AT_ONCE; k++) numbers[k] = number(i + k);
    const __m512i now = _mm512_loadu_si512(numbers);
    const __mmask8 starts = _mm512_cmpneq_epi64_mask(now, _mm512_alignr_epi64(now, last, 7));
    const int count = __builtin_popcount(starts);
    const __mmask8 first = static_cast<__mmask8>((1u << count) - 1);
    const __m512i at = _mm512_add_epi64(lanes, _mm512_set1_epi64(i));
    _mm512_mask_storeu_epi64(distinct + runs, first, _mm512_maskz_compress_epi64(starts, now));
    _mm512_mask_cvtepi64_storeu_epi32(begin + runs, first, _mm512_maskz_compress_epi64(starts, at));
    if (run) {
      // Byte k counts the starts up to k.
      const uint64_t counts = _pdep_u64(starts, BYTES) * BYTES;
      const __m512i of = _mm512_cvtepu8_epi64(_mm_cvtsi64_si128(static_cast<int64_t>(counts)));
      const __m512i runs_before = _mm512_set1_epi64(runs - 1);
      _mm512_mask_cvtepi64_storeu_epi32(run + i, 0xFF, _mm512_add_epi64(of, runs_before));
    }
    runs += count, last = now, before = numbers[AT_ONCE - 1];
  }
  begin[runs] = static_cast<int32_t>(i);
#endif
  for (; i < n; i++) {
    const uint64_t now = number(i);
    runs += now != before, before = now;
    distinct[runs - 1] = now, begin[runs] = static_cast<int32_t>(i + 1);  // a run's last ones stay
    if (run) run[i] = static_cast<int32_t>(runs - 1);
  }
  return runs;
}

// Replaces counters by the sums of those before them, and returns how many are not zero: distinct[r] is `low` plus the
// place of the r-th one of these, begin[r] the sum before it. Both have room for one more. Counters of zero may stay.
inline int64_t find_counted(int32_t* counters, int64_t n, uint64_t low, uint64_t* distinct, int32_t* begin) {
  int64_t found = 0, k = 0;
  int32_t before = 0;
#if defined(__AVX512F__)
  constexpr int64_t AT_ONCE = 16;
  const __m512i zero = _mm512_setzero_si512();
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (; k + AT_ONCE <= n; k += AT_ONCE) {
    const __m512i own = _mm512_loadu_si512(counters + k);
    const __mmask16 some = _mm512_test_epi32_mask(own, own);
    if (some == 0) continue;
    __m512i sums = own;
    sums = _mm512_add_epi32(sums, _mm512_alignr_epi32(sums, zero, 15));
    sums = _mm512_add_epi32(sums, _mm512_alignr_epi32(sums, zero, 14));
    sums = _mm512_add_epi32(sums, _mm512_alignr_epi32(sums, zero, 12));
    sums = _mm512_add_epi32(sums, _mm512_alignr_epi32(sums, zero, 8));
    const __m512i at = _mm512_add_epi32(_mm512_sub_epi32(sums, own), _mm512_set1_epi32(before));
    _mm512_storeu_si512(counters + k, at);
    const int count = __builtin_popcount(some);
    const __mmask16 kept = static_cast<__mmask16>((1u << count) - 1);
    _mm512_mask_storeu_epi32(begin + found, kept, _mm512_maskz_compress_epi32(some, at));
    const __m512i places = _mm512_maskz_compress_epi32(some, lanes);
    const __m512i from = _mm512_set1_epi64(static_cast<int64_t>(low) + k);
    const auto keys = [&](__m256i of) { return _mm512_add_epi64(_mm512_cvtepu32_epi64(of), from); };
    _mm512_mask_storeu_epi64(distinct + found, static_cast<__mmask8>(kept), keys(_mm512_castsi512_si256(places)));
    _mm512_mask_storeu_epi64(distinct + found + 8, static_cast<__mmask8>(kept >> 8),
                             keys(_mm512_extracti64x4_epi64(places, 1)));
    found += count, before += _mm_extract_epi32(_mm512_extracti32x4_epi32(sums, 3), 3);
  }
#endif
  for (; k < n; k++) {
    const int32_t own = counters[k];
    distinct[found] = low + static_cast<uint64_t>(k), begin[found] = counters[k] = before;
    found += own != 0, before += own;
  }
  return found;
}

}  // namespace recemb
