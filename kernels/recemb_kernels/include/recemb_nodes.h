// A table's ids as keys, and the nodes of its tree from these: what its plan consists of, by one thread or by all.
#pragma once
#include <algorithm>
#include <cstdint>

#include "recemb_sort.h"
#include "recemb_tree.h"

namespace recemb {

// x / by of an x below 2^53, where a division of doubles gives the same and takes a fraction of the time.
inline uint64_t small_quotient(uint64_t x, uint64_t by) {
  const auto real = [](uint64_t n) { return static_cast<double>(static_cast<int64_t>(n)); };
  return static_cast<uint64_t>(static_cast<int64_t>(real(x) / real(by)));
}
inline uint64_t quotient(uint64_t x, uint64_t by) { return x >> 53 ? x / by : small_quotient(x, by); }

inline uint64_t straight(uint64_t key) { return key; }

inline int64_t radix_of(const Table& table, int64_t level) {
  return table.code->radix[table.mirrored ? table.order - 1 - level : level];
}

// Calls act(read, begin, end) for each feature of the table: its records are read(r) for r in [begin, end), where those
// of all features follow each other, by `number` of their keys.
template <class Record, class Number, class Act>
void each_feature_of(const Call* call, const Table& table, Number number, Act act) {
  for (int64_t k = 0, begin = 0, end; k < table.num_features; k++, begin = end) {
    const int64_t f = table.features[k], first = call->offsets[f * call->batch], base = call->features[f].key_base;
    end = begin + call->offsets[(f + 1) * call->batch] - first;
    act([=, ids = call->ids, shift = first - begin](int64_t r) {
      return Record(number(static_cast<uint64_t>(ids[shift + r] + base)), shift + r);
    }, begin, end);
  }
}

// Values that have a counter each, on the stack, where these are not many more than what is counted.
constexpr int64_t COUNTED = int64_t{1} << SORT_BITS;
inline bool counts(int64_t values, int64_t nodes) { return values <= std::min(COUNTED, 4 * nodes + 64); }

// Numbers the values below `values` that are there(value), in their order: number[value]; returns how many there are.
// `found`, unless null, is these values.
template <class There>
int64_t number_values(int64_t values, There there, int32_t* number, int32_t* found) {
  int32_t count = 0;
  for (int64_t value = 0; value < values; value++) {
    if (!there(value)) continue;
    if (found) found[count] = static_cast<int32_t>(value);
    number[value] = count++;
  }
  return count;
}

// The nodes of each level of a tree, or of a range of its keys, as numbered there.
struct Nodes {
  int64_t count[MAX_ORDER];
  int32_t *first[MAX_ORDER], *parent[MAX_ORDER];
  int32_t* digit[MAX_ORDER];  // none where there is one level: they may not fit
  uint64_t* keys;             // [rows]
  int32_t* perm;              // [ids]
};

// Those of a whole tree, where a plan has them: Level.group is for digits first.
inline Nodes nodes_of(const Table& table) {
  Nodes to{};
  for (int64_t l = 0; l < table.order; l++) {
    const Level& level = table.level[l];
    to.first[l] = const_cast<int32_t*>(level.first), to.parent[l] = const_cast<int32_t*>(level.parent);
    to.digit[l] = const_cast<int32_t*>(l ? level.group : level.digit);
  }
  to.keys = reinterpret_cast<uint64_t*>(const_cast<int64_t*>(table.keys)), to.perm = const_cast<int32_t*>(table.perm);
  return to;
}

// What is above the last digit of each number, which may take the numbers' place, and that digit.
template <class Quotient>
void split_digits(const uint64_t* numbers, int64_t n, Quotient above_of, uint64_t radix, uint64_t* upper,
                  int32_t* digit) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const uint64_t number = numbers[i], above = above_of(number);
    digit[i] = static_cast<int32_t>(number - above * radix);
    upper[i] = above;
  }
}

// The nodes above the rows, which are there; `room` is for as many numbers.
inline void grow_above(const Table& table, Nodes& to, uint64_t* room) {
  int64_t nodes = to.count[table.order - 1];
  const uint64_t* numbers = to.keys;  // of a level's nodes, their digits read as one number
  for (int64_t l = table.order - 1; l > 0; l--, numbers = room) {
    const uint64_t radix = radix_of(table, l);
    if (table.most >> 53)
      split_digits(numbers, nodes, [&](uint64_t x) { return x / radix; }, radix, room, to.digit[l]);
    else
      split_digits(numbers, nodes, [&](uint64_t x) { return small_quotient(x, radix); }, radix, room, to.digit[l]);
    nodes = find_runs([room](int64_t i) { return room[i]; }, nodes, room, to.first[l - 1], to.parent[l]);
    to.count[l - 1] = nodes;
  }
  for (int64_t node = 0; node < nodes && table.order > 1; node++) to.digit[0][node] = static_cast<int32_t>(room[node]);
}

// The nodes of n sorted records, whose memory they take for a while.
template <class Record>
void grow(const Table& table, Record* sorted, int64_t n, Nodes& to) {
  const int64_t last = table.order - 1;
  for (int64_t i = 0; i < n; i++) to.perm[i] = sorted[i].value();
  to.count[last] = find_runs([sorted](int64_t i) { return sorted[i].key(); }, n, to.keys, to.first[last], nullptr);
  grow_above(table, to, reinterpret_cast<uint64_t*>(sorted));
}

// The same of records in any order, whose keys are [low, low + width): counted, where there are about as many keys as
// records. `next` has room for `width` numbers, `to.keys` for one more than there are rows.
template <class Record>
void count_and_grow(const Table& table, Record* records, int64_t n, uint64_t low, int64_t width, int32_t* next,
                    Nodes& to) {
  const int64_t last = table.order - 1;
  std::fill_n(next, width, 0);
  for (int64_t i = 0; i < n; i++) next[records[i].key() - low]++;
  int32_t* const first = to.first[last];
  const int64_t rows = to.count[last] = find_counted(next, width, low, to.keys, first);
  first[rows] = static_cast<int32_t>(n);
  for (int64_t i = 0; i < n; i++) to.perm[next[records[i].key() - low]++] = records[i].value();
  grow_above(table, to, reinterpret_cast<uint64_t*>(records));
}

}  // namespace recemb
