// The plan of a batch: per table, its ids sorted, made distinct and grouped by digit.
#pragma once
#include <cstdint>

#include "recemb_buffer.h"
#include "recemb_nodes.h"
#include "recemb_tree.h"

namespace recemb {

// Ids of a table from which all threads plan it together.
constexpr int64_t TOGETHER = 1 << 13;
// Ids that a thread's range of keys has at least, on average.
constexpr int64_t RANGE = 1024;

// What threads that plan a table together tell each other of their ranges: ids, nodes of each level, and, where its
// digits are counted, which of them are there.
struct Range {
  int64_t ids, nodes[MAX_ORDER];
  char digits[MAX_ORDER][COUNTED];
};

// Where the plans of all tables lie: 64-bit keys, then 32-bit arrays. Every array has room for each id of its
// table and a few more; pages that are not reached are not touched.
struct PlanRoom {
  Buffer keys, arrays, records, ranges, scratch;
  int64_t each = 0;    // records of an id
  int64_t words = 0;   // of `scratch`, a thread's own
  bool large = false;  // whether a table may be planned by all threads
  void reserve(const Call* call);
  void reserve_threads(int64_t threads);
  uint64_t* scratch_of(int thread) const { return scratch.at<uint64_t>() + thread * words; }
  // Of table `index`, each * ids of the wide ones. `base` is where the table's ids start when the tables' ids are laid
  // end to end.
  template <class Record>
  Record* records_of(int64_t index, int64_t base) const {
    return reinterpret_cast<Record*>(records.at<Wide>() + each * (base + 2 * index));
  }
};

// Calls `act` with the table's room for records, as records wide enough for its keys.
template <class Act>
void with_records(const Table& table, int64_t index, int64_t base, const PlanRoom& room, Act act) {
  if (table.most >> 32)
    act(room.records_of<Wide>(index, base));
  else
    act(room.records_of<Narrow>(index, base));
}

// Counts the ids of every table.
void count_ids(const Call* call);

// Lays out the arrays of table `index`, to be filled: by one thread.
void lay_out(const Call* call, int64_t index, int64_t base, const PlanRoom& room);

// Grows the tree of table `index` from its ids and cuts its slices; called by one thread, whose number it is given.
void plan_table(const Call* call, int64_t index, int64_t base, const PlanRoom& room, int thread);

// Cuts the slices of a tree that has been grown, or grows that of its mirror and cuts these; by one thread.
void choose_tree(const Call* call, int64_t index, int64_t base, const PlanRoom& room, int thread);

// Then groups the nodes of one of its levels by digit; called by one thread.
void plan_level(const Call* call, int64_t index, int64_t base, int64_t level, const PlanRoom& room);

// Of these the first part alone: numbers the distinct digits of a level's nodes in their order. Level.group holds the
// digits and ends as these numbers.
void number_digits(const Call* call, int64_t index, int64_t base, int64_t level, const PlanRoom& room);

// The second part, of all levels: by all threads of a region, with no barrier behind it.
void plan_levels_together(const Call* call, int64_t index, int64_t base, const PlanRoom& room);

// All of it by all threads of a region, each a range of keys. Nothing is left to do behind the last barrier.
void plan_together(const Call* call, int64_t index, int64_t base, const PlanRoom& room);

}  // namespace recemb
