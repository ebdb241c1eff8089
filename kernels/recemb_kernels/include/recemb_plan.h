// The plan of a batch: per table, its ids sorted, made distinct and grouped by digit.
#pragma once
#include <cstdint>

#include "recemb_tree.h"

namespace recemb {

// Memory that only grows and keeps its address between calls of one shape. With `huge`, large blocks ask for huge
// pages: rows and products are read in no order, and pages of 4 kB cost a miss in the TLB each.
class Buffer {
 public:
  explicit Buffer(bool huge = false) : huge_(huge) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();
  void* reserve(int64_t bytes);
  template <class T>
  T* at() const {
    return static_cast<T*>(memory_);
  }
  template <class T>
  T* room(int64_t count) {
    return static_cast<T*>(reserve(count * static_cast<int64_t>(sizeof(T))));
  }

  int64_t size() const { return size_; }  // bytes

  static bool poison;  // fill with NaN what is handed out: tests that nothing is read before it is written

 private:
  void grow(int64_t bytes);
  const bool huge_;
  void* memory_ = nullptr;
  int64_t size_ = 0;
};

// Where the plans of all tables lie: 64-bit keys, then 32-bit arrays. Every array has room for each id of its
// table and one more; pages that are not reached are not touched.
struct PlanRoom {
  Buffer keys, arrays, records, counts;
  void reserve(const Call* call);
};

// Counts the ids of every table.
void count_ids(const Call* call);

// Sorts the ids of table `index`, by all threads of a region together or by one alone. `base` is where the table's
// ids start when the tables' ids are laid end to end.
void sort_table(const Call* call, int64_t index, int64_t base, const PlanRoom& room, int thread, int threads);

// Grows the tree of table `index` from its ids, which it sorts if that has not been done, and cuts its slices; called
// by one thread.
void plan_table(const Call* call, int64_t index, int64_t base, const PlanRoom& room);

// Then groups the nodes of one of its levels by digit; called by one thread.
void plan_level(const Call* call, int64_t index, int64_t level);

}  // namespace recemb
