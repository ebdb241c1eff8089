// The table-independent part of a look-up: sorts and groups the ids of every table, opens one parallel region
// for all tables, hands each to the kernel compiled for it, and pools.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "recemb_sort.h"
#include "recemb_tree.h"

using namespace recemb;

namespace {

// The ids' keys in 64 bits, three arrays for the ids and six per level in 32, each with room for every id of the
// call plus one per table.
struct Layout {
  int32_t* plan;
  int64_t room;
  int64_t* key() const { return reinterpret_cast<int64_t*>(plan); }  // per table: distinct keys, rising
  int32_t* slot() const { return plan + 2 * room; }  // by position in the batch: distinct row within its table
  int32_t* bag() const { return plan + 3 * room; }   // by position: bag it belongs to
  int32_t* perm() const { return plan + 4 * room; }  // per table: positions in order of their row
  int32_t* level(int l, int which) const { return plan + (5 + 6 * l + which) * room; }
};

Layout layout(const Call* call) { return {call->plan, call->num_ids + call->num_tables}; }

// Points every table and level at its counts and arrays.
void bind(const Call* call) {
  const Layout lay = layout(call);
  for (int64_t t = 0; t < call->num_tables; t++) {
    Table& table = call->tables[t];
    const Counts& counts = call->counts[t];
    const int64_t at = counts.base + t;
    table.counts = &counts;
    table.keys = lay.key() + at;
    for (int l = 0; l < table.order; l++)
      table.level[l] = {counts.nodes[l],        counts.touched[l],       lay.level(l, 0) + at,
                        lay.level(l, 1) + at,   lay.level(l, 2) + at,    lay.level(l, 3) + at,
                        lay.level(l, 4) + at,   lay.level(l, 5) + at};
  }
}

// Orders a level's nodes by digit. `slice` holds the digits and ends as indices of the touched ones.
int64_t group_by_digit(int64_t nodes, int64_t radix, int32_t* slice, int32_t* by_digit, int32_t* touched,
                       int32_t* start) {
  std::vector<int64_t> digit(slice, slice + nodes);
  std::vector<int32_t> node(nodes);
  for (int64_t i = 0; i < nodes; i++) node[i] = static_cast<int32_t>(i);
  // Nodes of level 0 are in this order already.
  if (!std::is_sorted(digit.begin(), digit.end())) radix_sort(digit, node, radix - 1);
  int32_t found = 0;
  for (int64_t i = 0; i < nodes; i++) {
    if (i == 0 || digit[i] != digit[i - 1]) {
      touched[found] = static_cast<int32_t>(digit[i]);
      start[found++] = static_cast<int32_t>(i);
    }
    by_digit[i] = node[i];
    slice[node[i]] = found - 1;
  }
  start[found] = static_cast<int32_t>(nodes);
  return found;
}

void plan_table(const Call* call, const Table& table, int64_t index) {
  const Layout lay = layout(call);
  Counts& counts = call->counts[index];
  const int64_t at = counts.base + index;
  const int order = static_cast<int>(table.order);
  std::vector<int64_t> key(counts.ids);
  std::vector<int32_t> position(counts.ids);
  int64_t filled = 0, top = 0;
  for (int64_t f = 0; f < call->num_features; f++) {
    if (call->features[f].table != index) continue;
    for (int64_t i = call->offsets[f * call->batch]; i < call->offsets[(f + 1) * call->batch]; i++) {
      key[filled] = call->ids[i] + call->features[f].key_base;
      top |= key[filled];
      position[filled++] = static_cast<int32_t>(i);
    }
  }
  radix_sort(key, position, top);
  std::copy(position.begin(), position.end(), lay.perm() + at);

  int32_t *parent[MAX_ORDER], *first[MAX_ORDER], *digit[MAX_ORDER];
  int64_t nodes[MAX_ORDER] = {}, last[MAX_ORDER], prefix[MAX_ORDER];
  for (int l = 0; l < order; l++) {
    parent[l] = lay.level(l, 0) + at, first[l] = lay.level(l, 1) + at, digit[l] = lay.level(l, 2) + at;
    last[l] = -1;
  }
  for (int64_t i = 0; i < counts.ids; i++) {
    if (i == 0 || key[i] != key[i - 1]) {
      lay.key()[at + nodes[order - 1]] = prefix[order - 1] = key[i];
      for (int l = order - 1; l > 0; l--) prefix[l - 1] = prefix[l] / table.radix[l];
      for (int l = 0; l < order; l++) {
        if (prefix[l] == last[l]) continue;
        last[l] = prefix[l];
        const int64_t here = nodes[l]++;
        digit[l][here] = static_cast<int32_t>(l ? prefix[l] - prefix[l - 1] * table.radix[l] : prefix[0]);
        parent[l][here] = static_cast<int32_t>(l ? nodes[l - 1] - 1 : 0);
        first[l][here] = static_cast<int32_t>(l + 1 < order ? nodes[l + 1] : i);
      }
    }
    lay.slot()[position[i]] = static_cast<int32_t>(nodes[order - 1] - 1);
  }
  for (int l = 0; l < order; l++) {
    first[l][nodes[l]] = static_cast<int32_t>(l + 1 < order ? nodes[l + 1] : counts.ids);
    counts.nodes[l] = nodes[l];
    // A table that is not read by digit has no radix, and its keys may be too large for one.
    if (table.radix[l] == 0) continue;
    counts.touched[l] = group_by_digit(nodes[l], table.radix[l], digit[l], lay.level(l, 3) + at,
                                       lay.level(l, 4) + at, lay.level(l, 5) + at);
  }
}

// out[b, column ..] = sum or mean of the bag's rows.
void pool(const Call* call) {
  const Layout lay = layout(call);
#pragma omp for schedule(static)
  for (int64_t bag = 0; bag < call->num_features * call->batch; bag++) {
    const int64_t f = bag / call->batch, b = bag % call->batch;
    const Feature& feature = call->features[f];
    const Table& table = call->tables[feature.table];
    float* out = call->out + b * call->out_stride + feature.column;
    const int64_t begin = call->offsets[bag], end = call->offsets[bag + 1], dim = table.dim;
    if (end == begin + 1 && !call->weights) {
      const float* row = call->rows + table.counts->rows_at + lay.slot()[begin] * dim;
      std::copy(row, row + dim, out);
      continue;
    }
    std::fill(out, out + dim, 0.0f);
    const float share = feature.mean && end > begin ? 1.0f / static_cast<float>(end - begin) : 1.0f;
    for (int64_t i = begin; i < end; i++) {
      const float* row = call->rows + table.counts->rows_at + lay.slot()[i] * dim;
      const float w = call->weights ? call->weights[i] * share : share;
      for (int64_t j = 0; j < dim; j++) out[j] += w * row[j];
    }
  }
}

// grad_rows[u] = sum over the bags that hold row u of their gradient.
void unpool(const Call* call, const Table& table, int64_t index) {
  const Layout lay = layout(call);
  const Level& rows = table.level[table.order - 1];
  const int32_t* perm = lay.perm() + table.counts->base + index;
#pragma omp for schedule(static)
  for (int64_t u = 0; u < rows.nodes; u++) {
    float* grad = call->grad_rows + table.counts->rows_at + u * table.dim;
    std::fill(grad, grad + table.dim, 0.0f);
    for (int32_t k = rows.first[u]; k < rows.first[u + 1]; k++) {
      const int64_t i = perm[k], bag = lay.bag()[i], f = bag / call->batch;
      const float* out = call->grad_out + (bag % call->batch) * call->out_stride + call->features[f].column;
      const int64_t length = call->offsets[bag + 1] - call->offsets[bag];
      const float share = call->features[f].mean ? 1.0f / static_cast<float>(length) : 1.0f;
      const float w = call->weights ? call->weights[i] * share : share;
      for (int64_t j = 0; j < table.dim; j++) grad[j] += w * out[j];
    }
  }
}

void weight_gradients(const Call* call) {
  const Layout lay = layout(call);
#pragma omp for schedule(static)
  for (int64_t i = 0; i < call->num_ids; i++) {
    const int64_t bag = lay.bag()[i], f = bag / call->batch;
    const Table& table = call->tables[call->features[f].table];
    const float* row = call->rows + table.counts->rows_at + lay.slot()[i] * table.dim;
    const float* out = call->grad_out + (bag % call->batch) * call->out_stride + call->features[f].column;
    const float length = static_cast<float>(call->offsets[bag + 1] - call->offsets[bag]);
    float dot = 0;
    for (int64_t j = 0; j < table.dim; j++) dot += row[j] * out[j];
    call->grad_weights[i] = call->features[f].mean ? dot / length : dot;
  }
}

}  // namespace

extern "C" {

int64_t recemb_tree_call_size() { return sizeof(Call); }
int64_t recemb_tree_table_size() { return sizeof(Table); }
int64_t recemb_tree_counts_size() { return sizeof(Counts); }

// Sorts and groups the ids. sizes = floats of all distinct rows, products of cores, their gradients, and
// packed slices.
void recemb_tree_plan(Call* call, int64_t threads, int64_t* sizes) {
  const Layout lay = layout(call);
  for (int64_t f = 0; f < call->num_features; f++)
    call->counts[call->features[f].table].ids +=
        call->offsets[(f + 1) * call->batch] - call->offsets[f * call->batch];
  int64_t base = 0;
  for (int64_t t = 0; t < call->num_tables; t++) {
    call->counts[t].base = base;
    base += call->counts[t].ids;
  }
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static) nowait
    for (int64_t bag = 0; bag < call->num_features * call->batch; bag++)
      for (int64_t i = call->offsets[bag]; i < call->offsets[bag + 1]; i++) lay.bag()[i] = static_cast<int32_t>(bag);
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < call->num_tables; t++) plan_table(call, call->tables[t], t);
  }
  int64_t rows = 0, products = 0, grads = 0, packed = 0;
  for (int64_t t = 0; t < call->num_tables; t++) {
    const Table& table = call->tables[t];
    Counts& counts = call->counts[t];
    const int last = static_cast<int>(table.order) - 1;
    counts.rows_at = rows;
    rows += counts.nodes[last] * table.dim;
    for (int l = 0; l <= last; l++) {
      counts.packed_at[l] = packed, counts.partial_at[l] = products, counts.grad_at[l] = grads;
      packed += counts.touched[l] * table.packed_width[l];
      if (l > 0 && l < last) products += counts.nodes[l] * table.product_width[l];
      if (l < last) grads += counts.nodes[l] * table.product_width[l];
    }
  }
  sizes[0] = rows, sizes[1] = products, sizes[2] = grads, sizes[3] = packed;
}

void recemb_tree_forward(Call* call, int64_t threads) {
  bind(call);
#pragma omp parallel num_threads(threads)
  {
    for (int64_t t = 0; t < call->num_tables; t++) call->tables[t].forward(&call->tables[t], call);
#pragma omp barrier
    pool(call);
  }
}

void recemb_tree_backward(Call* call, int64_t threads) {
  bind(call);
#pragma omp parallel num_threads(threads)
  {
    if (call->grad_weights) weight_gradients(call);
    for (int64_t t = 0; t < call->num_tables; t++) {
      unpool(call, call->tables[t], t);
      call->tables[t].backward(&call->tables[t], call);
    }
  }
}
}
