#include "recemb_owners.h"

#include <algorithm>
#include <numeric>

namespace recemb {

namespace {

// Of the busiest thread's work to its share: below the first, tables are taken whole; below the second they stay with
// whom has had them, who has their weights in its cache.
constexpr double UNEVEN = 1.1, EVEN = 1.05;
// Ids of a table up to which it is one thread's: each has a workspace then, and of more ids a pass has work for all.
constexpr int64_t MOST_IDS = 1 << 14;
// What an id of a table is taken to cost before it has been seen to, in seconds.
constexpr double OF_AN_ID = 5e-8;
// A stage that has not been seen to. The first time does not count: memory comes page by page then.
constexpr double NEVER_SEEN = -1;
// Batches after which tables that did not share out evenly are seen to once more.
constexpr int64_t AGAIN = 256;

}  // namespace

void Owners::know(int64_t tables) {
  std::fill_n(took_.room<double>(STAGES * tables), STAGES * tables, NEVER_SEEN);
  cost_.room<double>(tables), order_.room<int32_t>(tables);
  std::fill_n(owner_.room<int32_t>(tables), tables, 0);
  tables_ = tables, threads_ = last_ = 0, refused_ = 0;
}

void Owners::note(Stage stage, int64_t table, double seconds) {
  double& mean = took_.at<double>()[stage * tables_ + table];
  if (mean == NEVER_SEEN)
    mean = 0;
  else  // others take the core now and then
    mean += mean == 0 ? seconds : 0.1 * (std::min(seconds, 4 * mean) - mean);
}

bool Owners::balanced(int threads, double most) {
  const double* cost = cost_.at<double>();
  double *load = load_.at<double>(), all = 0;
  std::fill_n(load, threads, 0.0);
  for (int64_t t = 0; t < tables_; t++) load[of(t)] += cost[t], all += cost[t];
  return *std::max_element(load, load + threads) * threads <= most * all;
}

void Owners::share_out(const Call* call, int threads) {
  threads_ = 0;
  if (threads < 2 || tables_ < 2 * threads) return;
  double* cost = cost_.at<double>();
  for (int64_t t = 0; t < tables_; t++) {
    const Table& table = call->tables[t];
    // The sums of columns that two features share have an order.
    if (table.adds || table.ids > MOST_IDS) return;
    cost[t] = 0;
    for (int stage = 0; stage < STAGES; stage++) cost[t] += std::max(took_.at<double>()[stage * tables_ + t], 0.0);
    if (cost[t] == 0) cost[t] = OF_AN_ID * static_cast<double>(table.ids + 1);
  }
  double* load = load_.room<double>(threads);
  if (last_ != threads || !balanced(threads, EVEN)) {
    // The longest first, each to whom has least to do.
    int32_t *order = order_.at<int32_t>(), *owner = owner_.at<int32_t>();
    std::iota(order, order + tables_, 0);
    std::stable_sort(order, order + tables_, [&](int32_t a, int32_t b) { return cost[a] > cost[b]; });
    std::fill_n(load, threads, 0.0);
    for (int64_t k = 0; k < tables_; k++) {
      const int64_t least = std::min_element(load, load + threads) - load;
      owner[order[k]] = static_cast<int32_t>(least), load[least] += cost[order[k]];
    }
    last_ = threads;
  }
  if (balanced(threads, UNEVEN))
    threads_ = threads, refused_ = 0;
  else if (++refused_ % AGAIN == 0)
    std::fill_n(took_.at<double>(), STAGES * tables_, NEVER_SEEN);
}

}  // namespace recemb
