#include "recemb_parts.h"

#include <omp.h>

#include <algorithm>

namespace recemb {

namespace {

// Rows that a part has at least, on average, and how much longer than the average the longest may take.
constexpr int64_t PART_ROWS = 1 << 13;
constexpr double UNEVEN = 1.15;
// What a row costs beside products, and an id each of its columns: multiply-adds that take as long.
constexpr double OF_A_ROW = 2048, OF_AN_ID = 24;
// Backwards between two trials of what has been slower.
constexpr int64_t BETWEEN_TRIALS = 32;
// The first one's time does not count: memory comes page by page then.
constexpr int64_t FIRST = 1;

// Where the parts of a table begin, nodes of its first level: begin[0 .. table.parts].
void cut_parts(Table& table, int64_t* begin) {
  const int64_t nodes = table.level[0].nodes;
  int64_t wanted = 1;
  while (wanted < MAX_PARTS && 2 * wanted * PART_ROWS <= table.rows()) wanted *= 2;
  begin[0] = 0, begin[1] = nodes, table.parts = 1;
  if (table.order < 2 || wanted < 2 || table.code->plan != FORWARD) return;
  // Of the backward of the nodes before one: a product once more and two gradients, of a row these alone.
  const double* product = table.code->product_cost[table.mirrored];
  const auto cost = [&](int64_t node) {
    double all = 0;
    for (int64_t l = 0; l < table.order; node = table.level[l++].first[node])
      all += static_cast<double>(node) * (l + 1 < table.order ? 3 * product[l] : 2 * product[l] + OF_A_ROW);
    return all + static_cast<double>(node) * OF_AN_ID * static_cast<double>(table.code->dim);
  };
  const double share = cost(nodes) / static_cast<double>(wanted);
  double longest = 0;
  for (int64_t p = 1; p <= wanted; p++) {
    const double goal = share * static_cast<double>(p);
    int64_t low = begin[p - 1], high = nodes;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (cost(middle) < goal)
        low = middle + 1;
      else
        high = middle;
    }
    if (low > begin[p - 1] + 1 && cost(low) - goal > goal - cost(low - 1)) low--;
    begin[p] = p == wanted ? nodes : low;
    longest = std::max(longest, cost(begin[p]) - cost(begin[p - 1]));
  }
  if (longest <= UNEVEN * share)
    table.parts = wanted;
  else
    begin[1] = nodes;
}

}  // namespace

void cut_slices(Table& table, int64_t most) {
  int32_t* cut = const_cast<int32_t*>(table.level[0].slice_node);
  const int64_t order = table.order;
  const auto first_row = [&](int64_t node) {
    for (int64_t l = 0; l + 1 < order; l++) node = table.level[l].first[node];
    return node;
  };
  int64_t begin[MAX_PARTS + 1];
  cut_parts(table, begin);
  if (table.parts > 1) most = std::max<int64_t>(1, most / 2);
  table.slices = 0;
  cut[0] = 0;
  for (int64_t p = 0; p < table.parts; p++) {
    table.part[p] = table.slices;
    int64_t from = first_row(begin[p]);
    const bool whole = order == 1 || first_row(begin[p + 1]) - from <= most;
    for (int64_t node = begin[p] + 1; node < begin[p + 1] && !whole; node++) {
      if (first_row(node + 1) - from <= most) continue;
      from = first_row(node);
      cut[++table.slices] = static_cast<int32_t>(node);
    }
    cut[++table.slices] = static_cast<int32_t>(begin[p + 1]);
  }
  table.part[table.parts] = table.slices;
  for (int64_t l = 1; l < order; l++)
    for (int64_t s = 0; s <= table.slices; s++)
      const_cast<int32_t*>(table.level[l].slice_node)[s] =
          table.level[l - 1].first[table.level[l - 1].slice_node[s]];
}

int64_t workers(const Table& table) {
  const int64_t threads = omp_get_num_threads();
  return table.parts > 1 && table.parts >= threads ? threads : 1;
}

int64_t Alone::always = -1;

void Alone::choose(const Call* call, int threads) {
  choice_ = threads > 1 && std::any_of(call->tables, call->tables + call->num_tables,
                                       [](const Table& table) { return table.parts > 1; });
  const bool faster = took_[1] < took_[0], trial = steps_ % BETWEEN_TRIALS == 0;
  alone_ = choice_ && (always < 0 ? steps_ <= FIRST || faster != trial : always != 0);
  steps_ += choice_;
}

void Alone::note(const Call* call, double seconds) {
  if (!choice_ || steps_ <= FIRST) return;
  double& mean = took_[alone_];
  const double each = seconds / static_cast<double>(call->num_ids);
  // Others take a core now and then.
  mean += mean == 0 ? each : 0.25 * (std::min(each, 2 * mean) - mean);
}

}  // namespace recemb
