// What the table-independent driver and the kernels compiled per table agree on.
//
// A table reads its ids as digits (i_1 .. i_d): d cores of a tensor train, quotient and remainder, or the id
// itself for d = 1. The batch's distinct ids form a tree: a node of level l is a distinct prefix
// (i_1 .. i_{l+1}), the nodes of level d - 1 are the distinct rows. Nodes are sorted, so the children of a node
// are neighbours and what belongs to a prefix is computed once. Digit k selects a row of parameter k.
#pragma once
#include <cstdint>

namespace recemb {

constexpr int MAX_ORDER = 8;

// What the plan finds out about one table; 64-bit fields, saved from the forward for the backward.
struct Counts {
  int64_t base, ids, rows_at;    // the table's ids are [base, base + ids) of the plan's per-id arrays
  int64_t nodes[MAX_ORDER];      // distinct prefixes per level
  int64_t touched[MAX_ORDER];    // distinct digits per level
  int64_t packed_at[MAX_ORDER];  // where the touched rows' packed copies start
  int64_t partial_at[MAX_ORDER]; // where what is computed per prefix starts (levels 1 .. d - 2)
  int64_t grad_at[MAX_ORDER];    // where its gradients start (levels 0 .. d - 2)
};

// One level of one table: counts, and pointers into the plan that are bound anew for each call.
struct Level {
  int64_t nodes, touched;
  const int32_t* parent;         // [nodes] node of the level above
  const int32_t* first;          // [nodes + 1] children in the level below (rows: ids in `perm`)
  const int32_t* slice;          // [nodes] its digit, as an index into `touched_digit`
  const int32_t* by_digit;       // [nodes] nodes ordered by digit
  const int32_t* touched_digit;  // [touched]
  const int32_t* touched_start;  // [touched + 1] into by_digit
};

// One feature: its table, where it is pooled to, and what is added to its ids, so that several features' ids
// can be told apart within one table. 64-bit fields throughout.
struct Feature {
  int64_t table, column, mean, key_base;
};

struct Table {
  int64_t order, dim;
  int64_t radix[MAX_ORDER];
  float* param[MAX_ORDER];   // [radix_k, width_k]
  float* grad[MAX_ORDER];    // same shape, zeroed; null when the update is fused
  float* state[MAX_ORDER];   // first optimizer state of each parameter
  float* state2[MAX_ORDER];  // second one (Adam)
  void (*forward)(const Table*, struct Call*);
  void (*backward)(const Table*, struct Call*);
  int64_t packed_width[MAX_ORDER];   // floats of one packed row of a parameter, 0 where rows are not packed
  int64_t product_width[MAX_ORDER];  // floats that one node of the level holds
  const int64_t* constants;          // the kernel's own, or null
  const Counts* counts;
  const int64_t* keys;  // [distinct rows] id plus key_base, rising
  Level level[MAX_ORDER];
};

struct Call {
  int64_t num_tables, num_features, batch, num_ids, out_stride, optimizer;
  const int64_t* ids;
  const int64_t* offsets;
  const float* weights;  // null when unweighted
  const Feature* features;
  Table* tables;
  Counts* counts;
  int32_t* plan;
  float* packed;
  float* partials;
  float* rows;
  float* out;
  const float* grad_out;
  float* grad_weights;   // null when not asked for
  float* grad_rows;
  float* grad_partials;
  void* scratch;         // of the kernel at work
  double lr, eps, beta1, beta2, step;
};

}  // namespace recemb
