// The plan of a large table by all threads of a region: each sorts a range of keys, and grows the part of the tree that
// these are. What one writes no other reads before all are done: cores that share no cache would hand each other all of
// every pass. Then every part moves to its place in the tree, which comes out as one thread's.
#include <omp.h>

#include <algorithm>

#include "recemb_nodes.h"
#include "recemb_plan.h"

namespace recemb {

namespace {

constexpr int64_t SAMPLES = 128;
// Fewer records are sorted where there is hardly room to count them.
constexpr int64_t FEW = 64;

// Where ranges begin, by a sample of the ids: so that all take about as long, a distinct id about as two ids more.
class Cuts {
 public:
  Cuts(const Call* call, const Table& table) : most_(table.most) {
    for (int64_t l = 1; l < table.order; l++) span_ *= table.code->radix[l];
    each_feature_of<Wide>(call, table, straight, [&](auto read, int64_t begin, int64_t end) {
      for (int64_t k = 0; k < SAMPLES; k++)
        if (const int64_t r = (2 * k + 1) * table.ids / (2 * SAMPLES); r >= begin && r < end) key_[k] = read(r).key();
    });
    std::sort(key_, key_ + SAMPLES);
    // Where as many ids as one of the sample stands for fall on so many keys.
    const double ids = static_cast<double>(table.ids) / (SAMPLES + 1);
    for (int64_t k = 0; k <= SAMPLES; k++) {
      const double keys = static_cast<double>((k < SAMPLES ? key_[k] : most_) - (k ? key_[k - 1] : 0));
      cost_[k] = (k ? cost_[k - 1] : 0) + ids + 2 * keys * ids / (keys + ids);
    }
  }

  // The first key of range t of so many: one that a subtree of the first level begins with.
  uint64_t begin(int64_t t, int64_t ranges) const {
    if (t == 0 || t == ranges) return t ? most_ + 1 : 0;
    const double goal = cost_[SAMPLES] * static_cast<double>(t) / static_cast<double>(ranges);
    const int64_t k = std::lower_bound(cost_, cost_ + SAMPLES, goal) - cost_;
    const uint64_t from = k ? key_[k - 1] : 0, keys = (k < SAMPLES ? key_[k] : most_) - from;
    const double before = k ? cost_[k - 1] : 0, share = (goal - before) / (cost_[k] - before);
    // A double rounds above 2^53: no begin may pass the next one's.
    const uint64_t below = std::min(keys, static_cast<uint64_t>(share * static_cast<double>(keys)));
    const uint64_t low = (from + below) / span_ * span_;
    if (most_ - low < span_) return goal - cost(low) < cost_[SAMPLES] - goal ? low : most_ + 1;
    return goal - cost(low) < cost(low + span_) - goal ? low : low + span_;
  }

 private:
  // Of the keys below one.
  double cost(uint64_t key) const {
    const int64_t k = std::lower_bound(key_, key_ + SAMPLES, key) - key_;
    const uint64_t from = k ? key_[k - 1] : 0, to = k < SAMPLES ? key_[k] : most_;
    const double before = k ? cost_[k - 1] : 0;
    if (key == from) return before;
    const double share = static_cast<double>(key - from) / static_cast<double>(std::max(to - from, key - from));
    return before + share * (cost_[k] - before);
  }

  const uint64_t most_;
  uint64_t span_ = 1, key_[SAMPLES];
  double cost_[SAMPLES + 1];  // up to a key of the sample, and up to the last key
};

// The nodes of the `n` ids whose keys are [low, low + width), in `slab`, which has room for two wide records of each.
// `to` has all but its keys.
template <class Record>
void grow_range(const Call* call, const Table& table, uint64_t low, uint64_t width, int64_t n, Wide* slab, Nodes& to) {
  Record *const a = reinterpret_cast<Record*>(slab), *const b = reinterpret_cast<Record*>(slab + 2 * n) - n;
  Record* next = b;
  each_feature_of<Record>(call, table, straight, [&](auto read, int64_t begin, int64_t end) {
    next = select_keys(read, begin, end, low, width, next);
  });
  // Counters, and the keys behind them, have what `b` leaves of the slab.
  const uint64_t most = sizeof(Record) < sizeof(Wide) ? 2 * n : n;
  if (n >= FEW && width <= most) {
    int32_t* const counters = reinterpret_cast<int32_t*>(slab);
    to.keys = reinterpret_cast<uint64_t*>(counters + (width + 1) / 2 * 2);
    count_and_grow(table, b, n, low, static_cast<int64_t>(width), counters, to);
  } else {
    Record* const sorted = radix_sort([b](int64_t i) { return b[i]; }, a, b, n, bits_of(table.most));
    to.keys = reinterpret_cast<uint64_t*>(sorted == a ? b : a);
    grow(table, sorted, n, to);
  }
}

void note_digits(const int32_t* digit, int64_t n, int64_t radix, char* there) {
  std::fill_n(there, radix, 0);
  for (int64_t i = 0; i < n; i++) there[digit[i]] = 1;
}

// Where a range's nodes go in the whole tree.
struct Moves {
  int64_t before[MAX_ORDER + 1] = {}, total[MAX_ORDER + 1] = {};  // nodes of each level; behind the last one, ids
  Moves(const Range* ranges, int64_t me, int64_t all, int64_t order) {
    for (int64_t t = 0; t < all; t++)
      for (int64_t l = 0; l <= order; l++) {
        const int64_t nodes = l < order ? ranges[t].nodes[l] : ranges[t].ids;
        total[l] += nodes, before[l] += t < me ? nodes : 0;
      }
  }
};

// Moves the nodes of one range to their places.
void move_range(Table& table, const Range* ranges, int64_t me, int64_t all, const Nodes& from) {
  const int64_t last = table.order - 1;
  const Moves moves(ranges, me, all, table.order);
  const Nodes to = nodes_of(table);
  std::copy_n(from.keys, from.count[last], to.keys + moves.before[last]);
  for (int64_t l = 0; l <= last; l++) {
    const int64_t n = from.count[l], at = moves.before[l];
    const int32_t below = static_cast<int32_t>(moves.before[l + 1]);
    for (int64_t i = 0; i < n; i++) to.first[l][at + i] = from.first[l][i] + below;
    int64_t touched = moves.total[l];
    if (l > 0) {
      const int32_t above = static_cast<int32_t>(moves.before[l - 1]);
      for (int64_t i = 0; i < n; i++) to.parent[l][at + i] = from.parent[l][i] + above;
    }
    if (const int64_t radix = radix_of(table, l); l > 0 && counts(radix, moves.total[l])) {
      int32_t number[COUNTED];
      int32_t* const digit = me == 0 ? const_cast<int32_t*>(table.level[l].digit) : nullptr;
      const auto there = [&](int64_t d) {
        return std::any_of(ranges, ranges + all, [&](const Range& range) { return range.digits[l][d] != 0; });
      };
      touched = number_values(radix, there, number, digit);
      for (int64_t i = 0; i < n; i++) to.digit[l][at + i] = number[from.digit[l][i]];
    } else if (last > 0) {
      std::copy_n(from.digit[l], n, to.digit[l] + at);
    }
    if (me > 0) continue;
    to.first[l][moves.total[l]] = static_cast<int32_t>(moves.total[l + 1]);
    table.level[l].nodes = moves.total[l], table.level[l].touched = touched;
  }
}

}  // namespace

void plan_together(const Call* call, int64_t index, int64_t base, const PlanRoom& room) {
  Table& table = call->tables[index];
  Range* const ranges = room.ranges.at<Range>();
  const int64_t me = omp_get_thread_num(), all = std::min<int64_t>(omp_get_num_threads(), table.ids / RANGE);
  const int64_t last = table.order - 1;
  Range& own = ranges[me];
  uint64_t low = 0, width = 0;
  if (me < all) {
    own.ids = 0;
    const Cuts cuts(call, table);
    low = cuts.begin(me, all), width = cuts.begin(me + 1, all) - low;
    each_feature_of<Wide>(call, table, straight, [&](auto read, int64_t begin, int64_t end) {
      int64_t ids = 0;
      for (int64_t r = begin; r < end; r++) ids += read(r).key() - low < width;
      own.ids += ids;
    });
  }
  if (me == 0) lay_out(call, index, base, room);
#pragma omp barrier
  Nodes grown{};
  if (me < all) {
    int64_t before = 0;
    for (int64_t t = 0; t < me; t++) before += ranges[t].ids;
    // In arrays that have no use yet, each with room for one number more in every range.
    for (int64_t l = 0; l <= last; l++) {
      const Level& level = table.level[l];
      grown.first[l] = const_cast<int32_t*>(level.run_start) + before + me;
      grown.parent[l] = const_cast<int32_t*>(level.run_group) + before + me;
      grown.digit[l] = const_cast<int32_t*>(level.run_below) + before + me;
    }
    grown.perm = const_cast<int32_t*>(table.perm) + before;
    Wide* const slab = room.records_of<Wide>(index, base) + 2 * before;
    if (table.most >> 32)
      grow_range<Wide>(call, table, low, width, own.ids, slab, grown);
    else
      grow_range<Narrow>(call, table, low, width, own.ids, slab, grown);
    std::copy_n(grown.count, table.order, own.nodes);
    for (int64_t l = 1; l <= last; l++)
      if (const int64_t radix = radix_of(table, l); radix <= COUNTED)
        note_digits(grown.digit[l], grown.count[l], radix, own.digits[l]);
  }
#pragma omp barrier
  if (me < all) move_range(table, ranges, me, all, grown);
#pragma omp barrier
#pragma omp single
  choose_tree(call, index, base, room, static_cast<int>(me));
  const auto left = [&](int64_t l) { return table.mirrored || !counts(radix_of(table, l), table.level[l].nodes); };
  bool any = false;
  for (int64_t l = 1; l <= last; l++) any = any || left(l);
  if (any) {
#pragma omp for schedule(dynamic)
    for (int64_t l = 1; l <= last; l++)
      if (left(l)) number_digits(call, index, base, l, room);
  }
  plan_levels_together(call, index, base, room);
#pragma omp barrier
}

}  // namespace recemb
