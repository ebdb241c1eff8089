#include "recemb_plan.h"

#include <algorithm>
#include <utility>

#include "recemb_nodes.h"
#include "recemb_parts.h"

namespace recemb {

namespace {

// 32-bit arrays of a plan: perm, then per level parent, first, digit, group, by_digit, runs (3), pieces, slices (3).
constexpr int64_t ARRAYS_PER_LEVEL = 12;
int64_t arrays_of(int64_t order) { return 1 + ARRAYS_PER_LEVEL * order; }
// Each with room for every id, and for one number more in each of the ranges that threads take.
int64_t array_size(const Table& table) { return table.ids + table.ids / RANGE + 2; }

// Number of an id with its digits in reverse: the last digit becomes the most significant.
struct Mirror {
  const TableCode& code;
  uint64_t operator()(uint64_t key) const {
    uint64_t digits[MAX_ORDER], mirrored = 0;
    for (int64_t l = code.order - 1; l > 0; l--) {
      const uint64_t upper = quotient(key, code.radix[l]);
      digits[l] = key - upper * code.radix[l];
      key = upper;
    }
    digits[0] = key;
    for (int64_t l = code.order - 1; l >= 0; l--) mirrored = mirrored * code.radix[l] + digits[l];
    return mirrored;
  }
};

// Work of the products of a tree with these numbers of nodes per level.
double product_cost(const Table& table, bool mirrored, const int64_t* nodes) {
  double cost = 0;
  for (int64_t l = 1; l + 1 < table.order; l++) cost += nodes[l] * table.code->product_cost[mirrored][l];
  return cost;
}

// Bits of a table of bits, in which distinct suffixes are counted.
constexpr uint64_t MOST = uint64_t{1} << 20;

// Whether products of suffixes are enough fewer than products of prefixes to sort again. Depends on the distinct
// ids alone, so that equal batches are computed in equal ways. `seen` has room for MOST bits.
bool mirror_is_cheaper(const Table& table, const int64_t* keys, uint64_t* seen) {
  const TableCode& code = *table.code;
  const int64_t levels = table.order;
  if (levels < 3 || code.product_cost[1][1] == 0) return false;
  int64_t straight[MAX_ORDER], mirrored[MAX_ORDER] = {};
  for (int64_t l = 0; l < levels; l++) straight[l] = table.level[l].nodes;
  const double most = 0.75 * product_cost(table, false, straight);
  // Distinct suffixes of each length; large tables of bits count hashes, and two suffixes with one hash count once.
  uint64_t span = code.radix[levels - 1];
  for (int64_t l = 1; l + 1 < levels; l++) {
    span *= code.radix[levels - 1 - l];
    std::fill_n(seen, std::min(span + 63, MOST) / 64, 0);
    for (int64_t u = 0; u < table.rows(); u++) {
      uint64_t suffix = static_cast<uint64_t>(keys[u]);
      suffix -= quotient(suffix, span) * span;
      if (span > MOST) suffix = suffix * 0x9E3779B97F4A7C15u >> 44;
      const uint64_t bit = uint64_t{1} << (suffix % 64);
      mirrored[l] += !(seen[suffix / 64] & bit);
      seen[suffix / 64] |= bit;
      // Mostly a few hundred rows tell.
      if (u % 256 == 255 && product_cost(table, true, mirrored) >= most) return false;
    }
  }
  return product_cost(table, true, mirrored) < most;
}

// Largest number that a key of the table may be, mirrored or not.
uint64_t largest_key(const Call* call, const Table& table) {
  uint64_t most = 1;
  for (int64_t l = 0; l < table.order; l++) most *= table.code->radix[l];
  if (most) return most - 1;
  for (int64_t k = 0; k < table.num_features; k++) {  // keys that are no digits have no radix
    const int64_t f = table.features[k];
    for (int64_t i = call->offsets[f * call->batch]; i < call->offsets[(f + 1) * call->batch]; i++)
      most |= static_cast<uint64_t>(call->ids[i] + call->features[f].key_base);
  }
  return most;
}

// Sorts the table's ids by `number` of their keys, into `a` or `b`.
template <class Record, class Number>
Record* sort_keys(const Call* call, const Table& table, Number number, Record* a, Record* b) {
  const int bits = bits_of(table.most);
  Record* sorted = a;
  each_feature_of<Record>(call, table, number, [&](auto read, int64_t begin, int64_t end) {
    if (table.num_features == 1)
      sorted = radix_sort(read, a, b, table.ids, bits);
    else
      for (int64_t r = begin; r < end; r++) b[r] = read(r);
  });
  return table.num_features == 1 ? sorted : radix_sort([b](int64_t i) { return b[i]; }, a, b, table.ids, bits);
}

// Sorts the ids by `number` of their keys and grows their tree.
template <class Number>
void sort_and_grow(const Call* call, int64_t index, int64_t base, const PlanRoom& room, Number number) {
  Table& table = call->tables[index];
  Nodes to = nodes_of(table);
  with_records(table, index, base, room, [&](auto* a) {
    grow(table, sort_keys(call, table, number, a, a + table.ids), table.ids, to);
  });
  for (int64_t l = 0; l < table.order; l++) table.level[l].nodes = table.level[l].touched = to.count[l];
}

}  // namespace

void PlanRoom::reserve(const Call* call) {
  int64_t ids = 0, total = 0;
  each = 2, words = 0, large = false;
  for (int64_t t = 0; t < call->num_tables; t++) {
    Table& table = call->tables[t];
    const int64_t room = table.ids + 2;
    ids += room, total += array_size(table) * arrays_of(table.order);
    // Sorted, they make room for two narrow ones of every node of each level but the first.
    each = std::max(each, table.order - 1);
    if (table.order > 2) words = MOST / 64;  // of what tells whether a mirror is cheaper
    table.most = largest_key(call, table), large = large || table.ids >= TOGETHER;
  }
  keys.room<int64_t>(ids);
  arrays.room<int32_t>(total);
  records.room<Wide>(each * ids);
}

void PlanRoom::reserve_threads(int64_t threads) {
  if (large) ranges.room<Range>(threads);
  scratch.room<uint64_t>(threads * words);
}

void count_ids(const Call* call) {
  for (int64_t t = 0; t < call->num_tables; t++) call->tables[t].ids = 0;
  for (int64_t f = 0; f < call->num_features; f++)
    call->tables[call->features[f].table].ids +=
        call->offsets[(f + 1) * call->batch] - call->offsets[f * call->batch];
}

void lay_out(const Call* call, int64_t index, int64_t base, const PlanRoom& room) {
  Table& table = call->tables[index];
  int32_t* next = room.arrays.at<int32_t>();
  for (int64_t t = 0; t < index; t++) next += array_size(call->tables[t]) * arrays_of(call->tables[t].order);
  const auto take = [&] { return std::exchange(next, next + array_size(table)); };
  table.keys = room.keys.at<int64_t>() + base + 2 * index, table.perm = take(), table.mirrored = 0;
  for (int64_t l = 0; l < table.order; l++) {
    Level& level = table.level[l];
    for (const int32_t** array : {&level.parent, &level.first, &level.digit, &level.group, &level.by_digit,
                                  &level.run_start, &level.run_group, &level.run_below,
                                  &level.piece_start, &level.slice_node, &level.past_run, &level.past_piece})
      *array = take();
  }
}

void plan_table(const Call* call, int64_t index, int64_t base, const PlanRoom& room, int thread) {
  lay_out(call, index, base, room);
  sort_and_grow(call, index, base, room, straight);
  choose_tree(call, index, base, room, thread);
}

void choose_tree(const Call* call, int64_t index, int64_t base, const PlanRoom& room, int thread) {
  Table& table = call->tables[index];
  if (mirror_is_cheaper(table, table.keys, room.scratch_of(thread))) {
    table.mirrored = 1;
    sort_and_grow(call, index, base, room, Mirror{*table.code});
  }
  cut_slices(table, table.code->plan == FORWARD ? call->slice_rows : table.ids);
}

}  // namespace recemb
