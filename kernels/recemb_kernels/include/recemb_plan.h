// The plan of a batch: per table, its ids sorted, made distinct and grouped by digit.
#pragma once
#include <cstdint>

#include "recemb_buffer.h"
#include "recemb_tree.h"

namespace recemb {

// Where the plans of all tables lie: 64-bit keys, then 32-bit arrays. Every array has room for each id of its
// table and one more; pages that are not reached are not touched.
struct PlanRoom {
  Buffer keys, arrays, records, counts, scratch;
  int64_t each = 0;   // records of an id
  int64_t words = 0;  // of `scratch`, a thread's own
  void reserve(const Call* call);
  void reserve_threads(int64_t tables, int64_t threads);
  uint64_t* scratch_of(int thread) const { return scratch.at<uint64_t>() + thread * words; }
};

// Counts the ids of every table.
void count_ids(const Call* call);

// Sorts the ids of table `index`, by all threads of a region together. `base` is where the table's ids start when the
// tables' ids are laid end to end.
void sort_table(const Call* call, int64_t index, int64_t base, const PlanRoom& room);

// Grows the tree of table `index` from its ids, which it sorts if that has not been done, and cuts its slices; called
// by one thread, whose number it is given.
void plan_table(const Call* call, int64_t index, int64_t base, const PlanRoom& room, int thread);

// Then groups the nodes of one of its levels by digit; called by one thread.
void plan_level(const Call* call, int64_t index, int64_t base, int64_t level, const PlanRoom& room);

}  // namespace recemb
