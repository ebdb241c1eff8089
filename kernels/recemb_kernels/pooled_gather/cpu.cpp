// Tables of stored rows: -DOPERATION=0 the row itself (dense tables, hashed rows), 1 quotient * remainder,
// 2 quotient + remainder, 3 both concatenated, 4 a narrow row pooled and then projected (mixed dimension). -DLEFT
// and -DRIGHT are the widths. Called by every thread of the driver's parallel region.
//
// The forward pools straight from the table; only the backward needs the distinct rows. A row of a parameter has
// one owner there: its gradient is summed in one place, in a fixed order, and the optimizer steps on it at once.
#include <algorithm>
#include <vector>

#include "recemb_bags.h"
#include "recemb_storage.h"
#include "recemb_tree.h"
#include "recemb_vector.h"

using namespace recemb;

namespace {

enum { ROW = 0, MULTIPLY = 1, ADD = 2, CONCATENATE = 3, PROJECT = 4 };
constexpr bool PAIR = OPERATION == MULTIPLY || OPERATION == ADD || OPERATION == CONCATENATE;
constexpr int W = OPERATION == CONCATENATE ? LEFT + RIGHT : LEFT;  // a row before pooling
constexpr int PROJECTION = OPERATION == PROJECT;  // its parameter; 0 where there is none
constexpr int64_t CHUNK = 256;  // bags of one partial sum of the projection's gradient

const float* row_of(const Table* table, int k, int64_t row) {
  return table->param[k] + row * (k == 0 ? LEFT : OPERATION == PROJECT ? LEFT : RIGHT);
}

[[gnu::always_inline]] inline void ask(const Table* table, int64_t key) {
  prefetch_stored(table->param[0], 0, LEFT, PAIR ? key / table->code->radix[1] : key);
}

// sum[W] += w * row
void add_row(const Table* table, int64_t key, float w, float* sum) {
  if constexpr (!PAIR) {
    float room[LEFT];
    const float* row = read_row<0, LEFT>(table->param[0], key, room);
    for (int j = 0; j < W; j++) sum[j] += w * row[j];
  } else {
    const int64_t c = table->code->radix[1];
    float rooms[LEFT + RIGHT];
    const float* q = read_row<0, LEFT>(table->param[0], key / c, rooms);
    const float* r = read_row<1, RIGHT>(table->param[1], key % c, rooms + LEFT);
    if constexpr (OPERATION == MULTIPLY)
      for (int j = 0; j < W; j++) sum[j] += w * (q[j] * r[j]);
    else if constexpr (OPERATION == ADD)
      for (int j = 0; j < W; j++) sum[j] += w * (q[j] + r[j]);
    else {
      for (int j = 0; j < LEFT; j++) sum[j] += w * q[j];
      for (int j = 0; j < RIGHT; j++) sum[LEFT + j] += w * r[j];
    }
  }
}

// out[RIGHT] = narrow[LEFT] P
void project(const Table* table, const float* narrow, float* out) {
  float sum[RIGHT] = {}, room[RIGHT];
  for (int k = 0; k < LEFT; k++) {
    const float* row = read_row<PROJECTION, RIGHT>(table->param[PROJECTION], k, room);
    // Left to itself, the compiler makes vectors across k.
#pragma omp simd
    for (int j = 0; j < RIGHT; j++) sum[j] += narrow[k] * row[j];
  }
  std::copy(sum, sum + RIGHT, out);
}

// Narrow bags of feature number k of the table, and their gradients: [B, LEFT] each.
float* narrow_at(const Table* table, const Call* call, int64_t k) { return table->kept + k * call->batch * LEFT; }
float* narrow_grad_at(const Table* table, const Call* call, int64_t k) { return table->spare + k * call->batch * LEFT; }
int64_t chunks_of(const Table* table, const Call* call) { return table->num_features * ((call->batch + CHUNK - 1) / CHUNK); }

int64_t kept(const Table* table, const Call* call) {
  return OPERATION == PROJECT && call->keep ? table->num_features * call->batch * LEFT : 0;
}

int64_t spare(const Table* table, const Call* call) {
  if (!call->grad_out) return 0;
  if (OPERATION == PROJECT) return table->num_features * call->batch * LEFT + chunks_of(table, call) * LEFT * RIGHT;
  return PAIR ? (table->rows() + table->level[1].past_piece[0]) * RIGHT : 0;
}

void forward(const Table* table, const Call* call) {
  each_feature(table, call, [&](int64_t f, int64_t begin, int64_t end) {
    const int64_t k = std::find(table->features, table->features + table->num_features, f) - table->features;
    pool_bags<W, OPERATION == PROJECT ? RIGHT : W>(
        call, f, begin, end, [&](int64_t key) { ask(table, key); },
        [&](int64_t key, float w, float* sum) { add_row(table, key, w, sum); },
        [&](int64_t b, const float* sum) {
          if (OPERATION == PROJECT && call->keep) std::copy(sum, sum + W, narrow_at(table, call, k) + b * W);
          if (adds_nothing(call, f, b)) return;
          if constexpr (OPERATION == PROJECT) {
            float wide[RIGHT];
            project(table, sum, wide);
            put_bag<RIGHT>(call, f, b, wide);
          } else {
            put_bag<W>(call, f, b, sum);
          }
        });
  });
}

// What row u sends to its remainder.
float* sent_row(const Table* table, int64_t u) { return table->spare + u * RIGHT; }

// A row's gradient goes to its quotient's, and to what it sends.
void split_row(const float* g, const float* quotient, const float* remainder, float* grad, float* sent) {
  if constexpr (OPERATION == MULTIPLY) {
    for (int j = 0; j < LEFT; j++) grad[j] += g[j] * remainder[j];
    for (int j = 0; j < RIGHT; j++) sent[j] = g[j] * quotient[j];
  } else {
    for (int j = 0; j < LEFT; j++) grad[j] += g[j];
    std::copy(g + (OPERATION == CONCATENATE ? LEFT : 0), g + W, sent);
  }
}

// Under "mult" the quotients' gradients read the remainders and the other way round: a quotient moves when its rows
// have sent what they send, the remainders move last.
void backward_pair(const Table* table, const Call* call) {
  const Level &top = table->level[0], &rows = table->level[1];
  const int64_t pieces = rows.past_piece[0];
  float* const sums = table->spare + rows.nodes * RIGHT;  // of pieces
  const auto cost = [&](int64_t node) { return int64_t{top.first[node]} + rows.first[top.first[node]]; };
  const Senders from(table, call);
  {
    Finished<LEFT> quotients(table, 0);
    share_tasks(0, top.nodes, cost, [&, from](int64_t node) {
      // Not for its state, which takes as long to ask for as to wait for.
      if (node + AHEAD<LEFT> < top.nodes) prefetch_row(row_of(table, 0, top.digit[node + AHEAD<LEFT>]), LEFT);
      const float* quotient = row_of(table, 0, top.digit[node]);
      float grad[LEFT] = {};
      for (int64_t u = top.first[node]; u < top.first[node + 1]; u++) {
        float g[W];
        row_gradient<W>(from, u, g);
        split_row(g, quotient, row_of(table, 1, rows.digit[rows.group[u]]), grad, sent_row(table, u));
      }
      std::copy(grad, grad + LEFT, quotients.add(top.digit[node]));
    });
  }
#pragma omp barrier
  Finished<RIGHT> remainders(table, 1);
  const auto is_whole = [&](int64_t run) { return rows.run_start[run + 1] - rows.run_start[run] <= PIECE; };
#pragma omp for schedule(static)
  for (int64_t p = 0; p < pieces; p++) {
    const int64_t from = rows.piece_start[p], to = rows.piece_start[p + 1], run = rows.group[rows.by_digit[from]];
    float sum[RIGHT] = {};
    for (int64_t k = from; k < to; k++) {
      if (k + AHEAD<RIGHT> < rows.nodes) prefetch_row(sent_row(table, rows.by_digit[k + AHEAD<RIGHT>]), RIGHT);
      const float* sent = sent_row(table, rows.by_digit[k]);
      for (int j = 0; j < RIGHT; j++) sum[j] += sent[j];
    }
    std::copy(sum, sum + RIGHT, is_whole(run) ? remainders.add(rows.digit[run]) : sums + p * RIGHT);
  }
#pragma omp for schedule(static) nowait
  for (int64_t run = 0; run < rows.past_run[0]; run++) {
    if (is_whole(run)) continue;
    float grad[RIGHT] = {};
    const int32_t* const first = std::lower_bound(rows.piece_start, rows.piece_start + pieces, rows.run_start[run]);
    for (int64_t p = first - rows.piece_start; rows.piece_start[p] < rows.run_start[run + 1]; p++)
      for (int j = 0; j < RIGHT; j++) grad[j] += sums[p * RIGHT + j];
    std::copy(grad, grad + RIGHT, remainders.add(rows.digit[run]));
  }
}

void backward_rows(const Table* table, const Call* call) {
  const int64_t rows = table->rows();
  const Senders from(table, call);
  Finished<LEFT> finished(table, 0);
  share_rows(table, [&, from](int64_t u) {
    if (u + AHEAD<LEFT> < rows) {
      const int64_t row = table->keys[u + AHEAD<LEFT>];
      prefetch_row(row_of(table, 0, row), LEFT);
      if (table->optimizer >= ADAGRAD && table->state[0])
        __builtin_prefetch(table->state[0] + row * (table->optimizer == ROWWISE_ADAGRAD ? 1 : LEFT), 1);
    }
    row_gradient<LEFT>(from, u, finished.add(table->keys[u]));
  });
}

// The narrow bags' gradients take the place of the output's; the projection's own is summed over chunks of bags.
void backward_projected(const Table* table, const Call* call) {
  const int64_t per_feature = (call->batch + CHUNK - 1) / CHUNK;
  float* partial = table->spare + table->num_features * call->batch * LEFT;
#pragma omp for schedule(static)
  for (int64_t task = 0; task < chunks_of(table, call); task++) {
    const int64_t k = task / per_feature, begin = task % per_feature * CHUNK;
    const Gradient& from = call->gradient[table->features[k]];
    float* sum = partial + task * LEFT * RIGHT;
    std::fill(sum, sum + LEFT * RIGHT, 0.0f);
    for (int64_t b = begin; b < std::min(begin + CHUNK, call->batch); b++) {
      const float *g = from.at + b * from.stride, *narrow = narrow_at(table, call, k) + b * LEFT;
      float* to = narrow_grad_at(table, call, k) + b * LEFT;
      for (int i = 0; i < LEFT; i++) {
        float dot = 0;
        const float* projection = table->param[1] + i * RIGHT;
#pragma omp simd reduction(+ : dot)
        for (int j = 0; j < RIGHT; j++) dot += g[j] * projection[j];
#pragma omp simd
        for (int j = 0; j < RIGHT; j++) sum[i * RIGHT + j] += narrow[i] * g[j];
        to[i] = dot;
      }
    }
  }
#pragma omp single
  for (int64_t k = 0; k < table->num_features; k++)
    call->gradient[table->features[k]] = {narrow_grad_at(table, call, k), LEFT};
}

void finish_projection(const Table* table, const Call* call) {
  const float* partial = table->spare + table->num_features * call->batch * LEFT;
#pragma omp for schedule(static) nowait
  for (int64_t i = 0; i < LEFT; i++) {
    float grad[RIGHT] = {};
    for (int64_t task = 0; task < chunks_of(table, call); task++)
      for (int j = 0; j < RIGHT; j++) grad[j] += partial[(task * LEFT + i) * RIGHT + j];
    finish_row<RIGHT>(table, 1, i, grad);
  }
}

void backward(const Table* table, const Call* call) {
  if constexpr (OPERATION == PROJECT) backward_projected(table, call);
  if (call->grad_weights) {
    each_feature(table, call, [&](int64_t f, int64_t begin, int64_t end) {
      weight_gradients(call, f, begin, end, [&](int64_t i, const float* grad) {
        float row[W] = {}, dot = 0;
        add_row(table, call->ids[i] + call->features[f].key_base, 1.0f, row);
#pragma omp simd reduction(+ : dot)
        for (int j = 0; j < W; j++) dot += row[j] * grad[j];
        return dot;
      });
    });
#pragma omp barrier
  }
  if constexpr (PAIR) backward_pair(table, call);
  if constexpr (!PAIR) backward_rows(table, call);
  if constexpr (OPERATION == PROJECT) finish_projection(table, call);
}

}  // namespace

extern "C" Functions recemb_kernel = {kept, spare, forward, TRAINS ? backward : nullptr};
