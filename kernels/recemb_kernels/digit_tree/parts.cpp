#include "recemb_parts.h"

#include <algorithm>

namespace recemb {

namespace {

// Rows that a part has at least, on average, and how much longer than the average the longest may take.
constexpr int64_t PART_ROWS = 1 << 13;
constexpr double UNEVEN = 1.15;
// What a node costs beside products, and an id each of its columns: multiply-adds that take as long.
constexpr double OF_A_NODE = 2048, OF_AN_ID = 24;
// Of a part for each number in the gradients of slices of cores that it has of its own: what is worth them.
constexpr double OF_A_GRADIENT = 256;
// Every so many backwards what has been slower is tried, so often: the first of these is not timed.
constexpr int64_t BETWEEN_TRIALS = 32, TRIALS = 2;

int64_t first_row(const Table& table, int64_t node) {
  for (int64_t l = 0; l + 1 < table.order; l++) node = table.level[l].first[node];
  return node;
}

// What the backward of the nodes before one of the first level takes: a product once more, as if none were kept, and two
// gradients, of a row these alone.
double cost_before(const Table& table, int64_t node) {
  const double* product = table.code->product_cost[table.mirrored];
  double all = 0;
  for (int64_t l = 0; l < table.order; node = table.level[l++].first[node])
    all += static_cast<double>(node) * ((l + 1 < table.order ? 3 : 2) * product[l] + OF_A_NODE);
  return all + static_cast<double>(node) * OF_AN_ID * static_cast<double>(table.code->dim);
}

// Parts that a table is worth, one where all of it is taken at once, and where slices are smaller than parts: these take
// memory of their own, and who asks for such slices wants little. Nor where a subtree is a slice that is larger.
int64_t parts_worth(const Table& table, int64_t most) {
  const int64_t nodes = table.level[0].nodes;
  if (table.order < 2 || most < PART_ROWS || table.rows() <= std::max(most, 2 * PART_ROWS - 1)) return 1;
  for (int64_t node = 0, from = 0, past; node < nodes; node++, from = past)
    if ((past = first_row(table, node + 1)) - from > most) return 1;
  double gradients = 0;  // no fewer than there are
  for (int64_t l = 1; l < table.order; l++) {
    const int64_t digits = table.code->radix[table.mirrored ? table.order - 1 - l : l];
    gradients += static_cast<double>(std::min(digits, table.level[l].nodes)) *
                 table.code->product_cost[table.mirrored][l];
  }
  const double whole = cost_before(table, nodes);
  int64_t parts = 1;
  while (parts < MAX_PARTS && 2 * parts * PART_ROWS <= table.rows() &&
         whole >= OF_A_GRADIENT * gradients * static_cast<double>(2 * parts))
    parts *= 2;
  return parts;
}

// Where the parts of a table begin, nodes of its first level: begin[0 .. table.parts].
void cut_parts(Table& table, int64_t most, int64_t* begin) {
  const int64_t nodes = table.level[0].nodes, parts = parts_worth(table, most);
  begin[0] = 0, begin[1] = nodes, table.parts = 1;
  if (parts == 1) return;
  const double share = cost_before(table, nodes) / static_cast<double>(parts);
  bool even = true;
  for (int64_t p = 1; p <= parts; p++) {
    const double goal = share * static_cast<double>(p);
    int64_t low = begin[p - 1], high = nodes;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (cost_before(table, middle) < goal)
        low = middle + 1;
      else
        high = middle;
    }
    if (low > begin[p - 1] + 1 && cost_before(table, low) - goal > goal - cost_before(table, low - 1)) low--;
    begin[p] = p == parts ? nodes : low;
    const double cost = cost_before(table, begin[p]) - cost_before(table, begin[p - 1]);
    even = even && begin[p] > begin[p - 1] && cost <= UNEVEN * share;
  }
  if (even)
    table.parts = parts;
  else
    begin[1] = nodes;
}

}  // namespace

void cut_slices(Table& table, int64_t most) {
  int32_t* cut = const_cast<int32_t*>(table.level[0].slice_node);
  const int64_t order = table.order;
  int64_t begin[MAX_PARTS + 1];
  cut_parts(table, most, begin);
  if (table.parts > 1) most /= 2;
  table.slices = 0;
  cut[0] = 0;
  for (int64_t p = 0; p < table.parts; p++) {
    table.part[p] = table.slices;
    const int64_t first = first_row(table, begin[p]), rows = first_row(table, begin[p + 1]) - first;
    // About alike, with room for a subtree that is more than what is left of a slice's share.
    const int64_t slices = order == 1 || rows <= most ? 1 : rows / (most - most / 8) + 1;
    for (int64_t node = begin[p] + 1, from = first, done = 1; node < begin[p + 1] && slices > 1; node++) {
      const int64_t row = first_row(table, node);
      if (row - first < rows * done / slices && first_row(table, node + 1) - from <= most) continue;
      from = row, done = (row - first) * slices / rows + 1;
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

int64_t workers(const Table& table, int64_t threads) {
  return table.parts > 1 && table.parts >= threads ? threads : 1;
}

int64_t Alone::always = -1;

void Alone::choose(const Call* call, int threads) {
  const bool was = alone_;
  choice_ = std::any_of(call->tables, call->tables + call->num_tables,
                        [&](const Table& table) { return workers(table, threads) > 1; });
  if (threads != threads_) took_[0] = took_[1] = 0, steps_ = 0, threads_ = threads;
  const bool faster = took_[0] != 0 && took_[1] < took_[0], trial = steps_ % BETWEEN_TRIALS < TRIALS;
  alone_ = choice_ && (always < 0 ? faster != trial : always != 0);
  changed_ = alone_ != was;
  steps_ += choice_;
}

void Alone::note(const Call* call, double seconds) {
  // The first one finds the caches as the other way has left them, and at times no memory yet.
  if (!choice_ || changed_) return;
  double& mean = took_[alone_];
  const double each = seconds / static_cast<double>(call->num_ids);
  // Others take a core now and then.
  mean += mean == 0 ? each : each < mean ? 0.5 * (each - mean) : 0.1 * (std::min(each, 2 * mean) - mean);
}

}  // namespace recemb
