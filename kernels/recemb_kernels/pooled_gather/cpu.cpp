// Tables of stored rows: -DOPERATION=0 the row itself (dense tables, hashed rows, the narrow side of mixed
// dimension), 1 quotient * remainder, 2 quotient + remainder, 3 both concatenated; -DLEFT and -DRIGHT are the
// widths. Called by every thread of the driver's parallel region.
//
// A row of a parameter has one owner: its gradient is summed in one place, in a fixed order, and the optimizer
// steps on it at once. Under "mult" either side's gradient reads the other side, so the touched rows are copied
// ("packed") first and the copies are read.
#include <algorithm>
#include <vector>

#include "recemb_optim.h"
#include "recemb_tree.h"

using namespace recemb;

namespace {

enum { ROW = 0, MULTIPLY = 1, ADD = 2, CONCATENATE = 3 };
constexpr int WIDTH[] = {LEFT, RIGHT};
constexpr int D = OPERATION == ROW ? LEFT : OPERATION == CONCATENATE ? LEFT + RIGHT : LEFT;
constexpr int AHEAD = 16;

float* scratch() {
  static thread_local std::vector<float> room;
  if (room.empty()) room.resize(std::max(LEFT, RIGHT));
  return room.data();
}

// The touched rows of parameter k, gathered; far rows are asked for before they are needed.
template <int k>
void pack(const Table& table, const Call& call, float* packed) {
  const Level& level = table.level[k];
#pragma omp for schedule(static) nowait
  for (int64_t g = 0; g < level.touched; g++) {
    if (g + AHEAD < level.touched)
      __builtin_prefetch(table.param[k] + static_cast<int64_t>(level.touched_digit[g + AHEAD]) * WIDTH[k]);
    const float* row = table.param[k] + static_cast<int64_t>(level.touched_digit[g]) * WIDTH[k];
    std::copy(row, row + WIDTH[k], packed + g * WIDTH[k]);
  }
}

float* packed_at(const Table& table, const Call& call, int k) { return call.packed + table.counts->packed_at[k]; }

template <int k>
void finish(const Table& table, const Call& call, int64_t digit, const float* grad) {
  constexpr int W = WIDTH[k];
  if (call.optimizer == GRADIENT) {
    std::copy(grad, grad + W, table.grad[k] + digit * W);
    return;
  }
  const Hyper h{call.lr, call.eps, call.beta1, call.beta2, call.step};
  const int64_t width = call.optimizer == ROWWISE_ADAGRAD ? 1 : W;
  update_row(call.optimizer, h, W, table.param[k] + digit * W, grad,
             table.state[k] ? table.state[k] + digit * width : nullptr,
             table.state2[k] ? table.state2[k] + digit * width : nullptr);
}

// grad += what row `u` with gradient `g` sends to its side k.
template <int k>
void send(const Table& table, const Call& call, int64_t u, const float* g, float* grad) {
  constexpr int W = WIDTH[k], FROM = OPERATION == CONCATENATE && k == 1 ? LEFT : 0;
  if constexpr (OPERATION == MULTIPLY) {
    const Level& rows = table.level[1];
    const int64_t other = k == 0 ? rows.slice[u] : rows.parent[u];
    const float* factor = packed_at(table, call, 1 - k) + other * W;
    for (int j = 0; j < W; j++) grad[j] += g[j] * factor[j];
  } else {
    for (int j = 0; j < W; j++) grad[j] += g[FROM + j];
  }
}

}  // namespace

extern "C" void recemb_table_forward(const Table* table, Call* call) {
  float* rows = call->rows + table->counts->rows_at;
  if constexpr (OPERATION == ROW) {
    pack<0>(*table, *call, rows);
    return;
  } else {
    pack<0>(*table, *call, packed_at(*table, *call, 0));
    pack<1>(*table, *call, packed_at(*table, *call, 1));
#pragma omp barrier
    const Level& level = table->level[1];
#pragma omp for schedule(static) nowait
    for (int64_t u = 0; u < level.nodes; u++) {
      // Level 0 is sorted by digit, so a node's place among its touched rows is the node itself.
      const float* q = packed_at(*table, *call, 0) + static_cast<int64_t>(level.parent[u]) * LEFT;
      const float* r = packed_at(*table, *call, 1) + static_cast<int64_t>(level.slice[u]) * RIGHT;
      float* row = rows + u * D;
      if constexpr (OPERATION == CONCATENATE) {
        std::copy(q, q + LEFT, row);
        std::copy(r, r + RIGHT, row + LEFT);
      } else {
        for (int j = 0; j < D; j++) row[j] = OPERATION == MULTIPLY ? q[j] * r[j] : q[j] + r[j];
      }
    }
  }
}

extern "C" void recemb_table_backward(const Table* table, Call* call) {
  const float* grads = call->grad_rows + table->counts->rows_at;
  const Level& top = table->level[0];
  if constexpr (OPERATION == ROW) {
#pragma omp for schedule(static) nowait
    for (int64_t u = 0; u < top.nodes; u++) finish<0>(*table, *call, top.touched_digit[u], grads + u * D);
  } else {
    const Level& rows = table->level[1];
#pragma omp for schedule(static) nowait
    for (int64_t node = 0; node < top.nodes; node++) {
      float* grad = scratch();
      std::fill(grad, grad + LEFT, 0.0f);
      for (int64_t u = top.first[node]; u < top.first[node + 1]; u++)
        send<0>(*table, *call, u, grads + u * D, grad);
      finish<0>(*table, *call, top.touched_digit[node], grad);
    }
#pragma omp for schedule(dynamic, 8) nowait
    for (int64_t g = 0; g < rows.touched; g++) {
      float* grad = scratch();
      std::fill(grad, grad + RIGHT, 0.0f);
      for (int32_t k = rows.touched_start[g]; k < rows.touched_start[g + 1]; k++)
        send<1>(*table, *call, rows.by_digit[k], grads + static_cast<int64_t>(rows.by_digit[k]) * D, grad);
      finish<1>(*table, *call, rows.touched_digit[g], grad);
    }
  }
}
