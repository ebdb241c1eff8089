// Which thread of a region has a table to itself, where the tables of a batch are many: from its plan to its step, in
// every batch of a state. Threads hand each other nothing then, which takes cores that share no cache longer than a
// table of a few thousand ids, and wait for each other once a pass.
#pragma once
#include <omp.h>

#include "recemb_buffer.h"
#include "recemb_tree.h"

namespace recemb {

enum Stage { PLANNED, POOLED, STEPPED, STAGES };

class Owners {
 public:
  // Makes room for this many tables.
  void know(int64_t tables);

  // Shares the tables out to so many threads, by what each has taken before, if all threads have about as much to do
  // then and no table is too large for one; the tables' ids are counted.
  void share_out(const Call* call, int threads);

  // Whether the tables have owners in this region, which may have other threads than it was asked to.
  bool whole() const { return threads_ > 1 && omp_get_num_threads() == threads_; }
  int of(int64_t table) const { return owner_.at<int32_t>()[table]; }

  // Calls act(table) for those tables of this thread that `wanted(table)` has, and notes how long each takes.
  template <class Wanted, class Act>
  void each_own(Stage stage, Wanted wanted, Act act) {
    const int me = omp_get_thread_num();
    for (int64_t t = 0; t < tables_; t++) {
      if (of(t) != me || !wanted(t)) continue;
      const double start = omp_get_wtime();
      act(t);
      note(stage, t, omp_get_wtime() - start);
    }
  }

 private:
  void note(Stage stage, int64_t table, double seconds);
  // Whether the busiest of the threads has at most so many times its share; fills load_.
  bool balanced(int threads, double most);

  int64_t tables_ = 0;
  int threads_ = 0;                            // that tables are shared out to; 0: to none
  int last_ = 0;                               // the same, of the last time
  int64_t refused_ = 0;                        // batches since they shared out evenly
  Buffer took_, cost_, owner_, order_, load_;  // [STAGES, tables] seconds; [tables]; [threads]
};

}  // namespace recemb
