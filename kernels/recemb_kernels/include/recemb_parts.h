// Tables of many rows in parts, each of which one thread may take alone: it computes the products of its rows and adds
// up their gradients, and hands nothing over but its sums. Cores that share no cache lose less time so; those that do
// share one lose a little, since each reads all slices of cores.
#pragma once
#include "recemb_tree.h"

namespace recemb {

// Cuts a table's tree into parts where that is worth it, and these into slices of whole subtrees, of at most `most` rows
// where a subtree is not larger itself; half as many in several parts, which two threads may work on at once. Depends on
// the ids alone.
void cut_slices(Table& table, int64_t most);

// Of so many threads, those that may take slices or parts of a table alone; 1: none.
int64_t workers(const Table& table, int64_t threads);

// Whether a backward gives parts to one thread each, or every part to all threads together: sums are the same, so it is
// whatever has been faster of late.
class Alone {
 public:
  // Decides for the next backward, of so many threads; the slower way is tried now and then.
  void choose(const Call* call, int threads);
  bool now() const { return alone_; }
  // How long that backward took, in seconds.
  void note(const Call* call, double seconds);

  static int64_t always;  // tests: 1 alone, 0 together, -1 whatever has been faster

 private:
  double took_[2] = {};  // seconds of an id, together and alone; 0: not seen
  int64_t steps_ = 0;
  int threads_ = 0;
  bool choice_ = false, alone_ = false, changed_ = false;
};

}  // namespace recemb
