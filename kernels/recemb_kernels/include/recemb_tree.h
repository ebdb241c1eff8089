// What the table-independent driver and the kernels compiled per table agree on.
//
// A table reads its ids as digits (i_1 .. i_d): d cores of a tensor train, quotient and remainder, or the id
// itself for d = 1. The batch's distinct ids form a tree: a node of level l is a distinct prefix
// (i_1 .. i_{l+1}), the nodes of level d - 1 are the distinct rows. Nodes are sorted, so the children of a node
// are neighbours and what belongs to a prefix is computed once. Digit k selects a row of parameter k.
//
// A mirrored plan reads the digits from the other end, (i_d .. i_1): suffixes are shared instead of prefixes.
#pragma once
#include <cstdint>

#include "recemb_optim.h"

namespace recemb {

constexpr int MAX_ORDER = 8;
constexpr int64_t LINE = 16;  // floats of a cache line

// One level of one table's tree. Nodes are cut into slices, whole subtrees of level 0, that share a workspace.
// Within a slice they are grouped by digit: a run is one digit of one slice, a piece is at most PIECE nodes of one
// run. Runs and pieces of a slice are numbered from its first node on: no slice waits for how many others have. Level 0
// holds each digit once and in order, and has `digit` alone.
struct Level {
  int64_t nodes, touched;       // distinct prefixes, distinct digits
  const int32_t* parent;        // [nodes] node of the level above
  const int32_t* first;         // [nodes + 1] children in the level below (rows: ids in `perm`)
  const int32_t* digit;         // [touched]
  const int32_t* group;         // [nodes] index of the node's digit in `digit`
  const int32_t* by_digit;      // [nodes] nodes in order of slice and digit
  const int32_t* run_start;     // into by_digit; behind a slice's last run, where that ends
  const int32_t* run_group;     // index into `digit`
  const int32_t* run_below;     // children of the nodes before
  const int32_t* piece_start;   // into by_digit; behind a slice's last piece, where that ends
  const int32_t* slice_node;    // [slices + 1] first node, first run and first piece of each slice
  const int32_t* past_run;      // [slices] behind its last run
  const int32_t* past_piece;    // [slices] behind its last piece
};

constexpr int PIECE = 64;
constexpr int MAX_PARTS = 8;

// The first pass of a kernel that works on the batch's distinct rows. Only those of the forward are cut into slices.
enum Plan : int64_t { NEVER = 0, FORWARD = 1, BACKWARD = 2 };

struct Table;
struct Call;

// One kernel, compiled for the widths of its table. All but the workspaces run on every thread of a region.
struct Functions {
  int64_t (*kept)(const Table*, const Call*);  // floats held from the forward to the backward
  int64_t (*spare)(const Table*, const Call*); // floats of one pass, forward or backward
  void (*forward)(const Table*, const Call*);
  void (*backward)(const Table*, const Call*);
  int64_t own;                                 // floats of each thread's own
};

// What is fixed for one table of a group.
struct TableCode {
  int64_t order, dim;        // number of digits; columns of `out`
  int64_t parameters;        // parameters in the call's flat lists
  int64_t plan;              // Plan
  int64_t radix[MAX_ORDER];
  double product_cost[2][MAX_ORDER];  // work per node of a level, straight and mirrored; 0: never mirrored
  const int64_t* constants;  // the kernel's own numbers, or null
  Functions kernel, mirror;  // straight and mirrored
};

// One feature: its table, where it is pooled to, and what is added to its ids, so that several features' ids
// can be told apart within one table. Of bags in two parts each is a feature, of one table each: `other` is the other
// part, -1 for whole bags, and the second one's rows are added to what the first one has left in their columns.
struct FeatureCode {
  int64_t table, column, mean, key_base, other, adds;
};

// The optimizer of one table, or GRADIENT to have its gradients written out; bit k of `left` asks for the
// gradient of parameter k alone, while the others are stepped.
struct Rule {
  int64_t optimizer, left;
  double lr, eps, beta1, beta2, lr_decay;
};

// One table of one call: pointers, and the plan of its distinct ids.
struct Table {
  const TableCode* code;
  int64_t order, optimizer, left, mirrored, ids, slices;
  uint64_t most;             // no key is larger
  float* const* param;       // [radix_k, width_k] each
  float* const* grad;        // zeroed, same shapes, where written out; null where nobody asks for it
  float* const* state;       // first optimizer state of each parameter
  float* const* state2;      // second one (Adam)
  Hyper hyper[MAX_ORDER];    // per parameter
  const int64_t* features;   // indices of the features that read this table
  int64_t num_features;
  int64_t adds;              // whether one of them adds to another's columns
  const int64_t* keys;       // [distinct rows] id plus key_base (digits reversed when mirrored), rising
  const int32_t* perm;       // [ids] positions in the batch, in order of their row
  float* kept;
  float* spare;
  int64_t spare_size;
  // Part p, slices [part[p], part[p + 1]), takes about as long as any other. What is summed over a table is summed over
  // each of its parts, then over these, whoever works on them.
  int64_t parts, part[MAX_PARTS + 1];
  int64_t workers;           // threads that take slices or parts alone, in workspaces of their own; 1: all take each
  int64_t share_rows;        // slice_rows over the tables in several slices: bounds the products it keeps
  Level level[MAX_ORDER];
  int64_t rows() const { return level[order - 1].nodes; }
};

// Where a feature's gradient is read: sample b's at `at + b * stride`.
struct Gradient {
  const float* at;
  int64_t stride;
};

struct Call {
  int64_t num_tables, num_features, batch, num_ids, columns, slice_rows, keep;
  const int64_t* ids;
  const int64_t* offsets;
  const float* weights;  // null when unweighted
  const TableCode* codes;
  const FeatureCode* features;
  float* const* param;   // table by table
  float* out;
  // backward
  const float* grad_out;
  float* grad_weights;   // null when not asked for
  const Rule* rules;     // per table; null in the forward
  float* const* grad;    // table by table, null where there is none, as below
  float* const* state;
  float* const* state2;
  float* const* steps;
  // set by the driver
  Table* tables;
  Gradient* gradient;    // per feature
  const int32_t* bag;    // [ids] bag of each position; null when every bag holds one id
  const float* share;    // [bags] what an id of a mean counts for; null when every bag holds one id, or none is a mean
  int32_t* slot;         // [ids] distinct row of each position; null unless rows are pooled from a list
  float* own;            // [threads, own_stride] of the kernel at work
  int64_t own_stride;
};

}  // namespace recemb
