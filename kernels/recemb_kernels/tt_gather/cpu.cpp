// Rows and core gradients of one tensor-train table, compiled for its ranks and dimension shape:
// -DDIMS=q_1,...,q_d -DRANKS=1,R_1,...,R_{d-1},1. Called by every thread of the driver's parallel region; the
// `omp for` loops share the work.
//
// Cores are copied into a packed layout first, touched slices only: ranks padded to a whole number of vectors,
// the last core transposed. Everything below reads the copies, so a slice can be updated as soon as its
// gradient is complete. Every slice and every node has one owner: results do not depend on the thread count.
#include <algorithm>
#include <vector>

#include "recemb_optim.h"
#include "recemb_tree.h"
#include "recemb_vector.h"

using namespace recemb;

namespace {

constexpr int DIM[] = {DIMS};
constexpr int RANK[] = {RANKS};
constexpr int ORDER = sizeof(DIM) / sizeof(DIM[0]);
constexpr int LAST = ORDER - 1;
static_assert(sizeof(RANK) / sizeof(RANK[0]) == ORDER + 1, "one rank more than cores");

constexpr int product(int l) {  // q_1 .. q_l
  int total = 1;
  for (int k = 0; k < l; k++) total *= DIM[k];
  return total;
}
constexpr int D = product(ORDER);
constexpr int WIDTH(int l) { return RANK[l] * DIM[l] * RANK[l + 1]; }  // one slice of core l as stored
// One slice as packed: [R_{l-1}][q_l][padded R_l], the last one [q_d][padded R_{d-1}].
constexpr int PACKED(int l) {
  return l == LAST ? DIM[l] * round_up(RANK[l]) : RANK[l] * DIM[l] * round_up(RANK[l + 1]);
}
constexpr int WIDEST() {
  int most = 0;
  for (int l = 0; l < ORDER; l++) most = std::max(most, PACKED(l));
  return most;
}

// Per-thread room for one slice, off the stack: a slice of rank 256 is over a megabyte.
float* scratch(int which) {
  static thread_local std::vector<float> room[2];
  if (room[which].empty()) room[which].resize(WIDEST());
  return room[which].data();
}

template <int l>
void pack(const float* slice, float* packed) {
  constexpr int K = RANK[l], Q = DIM[l], R = RANK[l + 1];
  if constexpr (l == LAST) {
    constexpr int P = round_up(K);
    for (int e = 0; e < Q; e++) {
      for (int k = 0; k < K; k++) packed[e * P + k] = slice[k * Q + e];
      for (int k = K; k < P; k++) packed[e * P + k] = 0;
    }
  } else {
    constexpr int P = round_up(R);
    for (int i = 0; i < K * Q; i++) {
      for (int r = 0; r < R; r++) packed[i * P + r] = slice[i * R + r];
      for (int r = R; r < P; r++) packed[i * P + r] = 0;
    }
  }
}

template <int l>
void unpack(const float* packed, float* slice) {
  constexpr int K = RANK[l], Q = DIM[l], R = RANK[l + 1];
  if constexpr (l == LAST) {
    constexpr int P = round_up(K);
    for (int k = 0; k < K; k++)
      for (int e = 0; e < Q; e++) slice[k * Q + e] = packed[e * P + k];
  } else {
    constexpr int P = round_up(R);
    for (int i = 0; i < K * Q; i++)
      for (int r = 0; r < R; r++) slice[i * R + r] = packed[i * P + r];
  }
}

template <int l>
void pack_touched(const Table& table, const Call& call) {
  const Level& level = table.level[l];
#pragma omp for schedule(static) nowait
  for (int64_t g = 0; g < level.touched; g++) {
    const int64_t digit = level.touched_digit[g];
    pack<l>(table.param[l] + digit * WIDTH(l), call.packed + table.counts->packed_at[l] + g * PACKED(l));
  }
  if constexpr (l < LAST) pack_touched<l + 1>(table, call);
}

// The finished gradient of one slice: written out, or applied to the slice at once.
template <int l>
void finish(const Table& table, const Call& call, int64_t digit, const float* packed) {
  float* grad = scratch(1);
  unpack<l>(packed, grad);
  if (call.optimizer == GRADIENT) {
    std::copy(grad, grad + WIDTH(l), table.grad[l] + digit * WIDTH(l));
    return;
  }
  const Hyper h{call.lr, call.eps, call.beta1, call.beta2, call.step};
  const int64_t width = call.optimizer == ROWWISE_ADAGRAD ? 1 : WIDTH(l);
  float* state = table.state[l] ? table.state[l] + digit * width : nullptr;
  float* state2 = table.state2[l] ? table.state2[l] + digit * width : nullptr;
  update_row(call.optimizer, h, WIDTH(l), table.param[l] + digit * WIDTH(l), grad, state, state2);
}

const float* slice_of(const Table& table, const Call& call, int l, int64_t node) {
  return call.packed + table.counts->packed_at[l] + table.level[l].slice[node] * PACKED(l);
}

// The product of cores 0 .. l at a node; level 0 is the packed core itself.
template <int l>
const float* partial(const Table& table, const Call& call, int64_t node) {
  if constexpr (l == 0) return slice_of(table, call, 0, node);
  return call.partials + table.counts->partial_at[l] + node * (product(l + 1) * round_up(RANK[l + 1]));
}

template <int l>
float* grad_partial(const Table& table, const Call& call, int64_t node) {
  return call.grad_partials + table.counts->grad_at[l] + node * (product(l + 1) * round_up(RANK[l + 1]));
}

template <int l>
void multiply_node(const Table& table, const Call& call, int64_t node) {
  const Level& level = table.level[l];
  multiply<product(l), RANK[l], DIM[l] * round_up(RANK[l + 1])>(
      partial<l - 1>(table, call, level.parent[node]), round_up(RANK[l]), slice_of(table, call, l, node),
      const_cast<float*>(partial<l>(table, call, node)));
}

template <int l>
void forward_level(const Table& table, const Call& call) {
  if constexpr (l < LAST - 1) {
    if constexpr (l > 0) {
#pragma omp for schedule(static)
      for (int64_t node = 0; node < table.level[l].nodes; node++) multiply_node<l>(table, call, node);
    }
    forward_level<l + 1>(table, call);
  } else {
    // The last product and its rows together, while the product is in cache.
    const Level& level = table.level[l];
#pragma omp for schedule(dynamic, 16)
    for (int64_t node = 0; node < level.nodes; node++) {
      if constexpr (l > 0) multiply_node<l>(table, call, node);
      for (int64_t row = level.first[node]; row < level.first[node + 1]; row++)
        dot_rows<product(LAST), round_up(RANK[LAST]), DIM[LAST]>(
            partial<LAST - 1>(table, call, node), slice_of(table, call, LAST, row),
            call.rows + table.counts->rows_at + row * D);
    }
  }
}

// grad of core l (0 < l < d-1) and of the products one level up, from the products of level l.
template <int l>
void backward_level(const Table& table, const Call& call) {
  if constexpr (l > 0) {
    constexpr int M = product(l), K = RANK[l], KP = round_up(K), N = DIM[l] * round_up(RANK[l + 1]);
    const Level &level = table.level[l], &above = table.level[l - 1];
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t g = 0; g < level.touched; g++) {
      float* tile = scratch(0);
      std::fill(tile, tile + K * N, 0.0f);
      for (int32_t k = level.touched_start[g]; k < level.touched_start[g + 1]; k++) {
        const int64_t node = level.by_digit[k];
        accumulate_outer<M, K, N>(partial<l - 1>(table, call, level.parent[node]), KP,
                                  grad_partial<l>(table, call, node), tile);
      }
      finish<l>(table, call, level.touched_digit[g], tile);
    }
#pragma omp for schedule(dynamic, 16)
    for (int64_t up = 0; up < above.nodes; up++) {
      float* grad = grad_partial<l - 1>(table, call, up);
      std::fill(grad, grad + M * KP, 0.0f);
      for (int64_t node = above.first[up]; node < above.first[up + 1]; node++)
        multiply_transposed<M, K, N>(grad_partial<l>(table, call, node), slice_of(table, call, l, node), grad, KP);
    }
    backward_level<l - 1>(table, call);
  } else {
#pragma omp for schedule(static)
    for (int64_t node = 0; node < table.level[0].nodes; node++)
      finish<0>(table, call, table.level[0].touched_digit[table.level[0].slice[node]],
                grad_partial<0>(table, call, node));
  }
}

}  // namespace

extern "C" void recemb_table_forward(const Table* table, Call* call) {
  pack_touched<0>(*table, *call);
#pragma omp barrier
  forward_level<0>(*table, *call);
}

extern "C" void recemb_table_backward(const Table* table, Call* call) {
  constexpr int M = product(LAST), KP = round_up(RANK[LAST]), Q = DIM[LAST];
  const Level &rows = table->level[LAST], &above = table->level[LAST - 1];
#pragma omp for schedule(dynamic, 16) nowait
  for (int64_t node = 0; node < above.nodes; node++) {
    float* grad = grad_partial<LAST - 1>(*table, *call, node);
    std::fill(grad, grad + M * KP, 0.0f);
    for (int64_t row = above.first[node]; row < above.first[node + 1]; row++)
      spread_rows<M, KP, Q>(call->grad_rows + table->counts->rows_at + row * D, slice_of(*table, *call, LAST, row), grad);
  }
#pragma omp for schedule(dynamic, 4)
  for (int64_t g = 0; g < rows.touched; g++) {
    float* tile = scratch(0);
    std::fill(tile, tile + Q * KP, 0.0f);
    for (int32_t k = rows.touched_start[g]; k < rows.touched_start[g + 1]; k++) {
      const int64_t row = rows.by_digit[k];
      gather_rows<M, KP, Q>(call->grad_rows + table->counts->rows_at + row * D,
                            partial<LAST - 1>(*table, *call, rows.parent[row]), tile);
    }
    finish<LAST>(*table, *call, rows.touched_digit[g], tile);
  }
  backward_level<LAST - 1>(*table, *call);
}
