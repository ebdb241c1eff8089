// Bags: pooling rows into them, and the way back of their gradients. Templates, so that a row's width is a
// constant of the kernel.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "recemb_share.h"
#include "recemb_tree.h"

namespace recemb {

// With -DRECEMB_POISON kernels fill their own memory with NaN before each use: a test sees what was not written.
#ifdef RECEMB_POISON
constexpr bool POISON = true;
#else
constexpr bool POISON = false;
#endif

// Positions between asking for a row of W floats and reading it: 4 kB of rows, where that is 12 and no more than 64.
template <int W>
constexpr int64_t AHEAD = std::min(64, std::max(12, 1024 / W));
constexpr int64_t ROWS = 32;   // distinct rows that a thread takes at once: hot rows, which many bags send to, come first

// To compilers a function that only asks does nothing, and calls of it are left out unless it is inlined at once.
template <bool WRITE = false, int64_t LINES = 8>
[[gnu::always_inline]] static inline void prefetch_row(const float* row, int64_t width) {
  for (int64_t j = 0; j < std::min<int64_t>(width, LINES * LINE); j += LINE) __builtin_prefetch(row + j, WRITE);
}

// How many ids sample b has in feature f, both parts of its bag.
static inline int64_t length_of(const Call* call, int64_t f, int64_t b) {
  const int64_t *offsets = call->offsets + b, other = call->features[f].other;
  const auto part = [&](int64_t g) { return offsets[g * call->batch + 1] - offsets[g * call->batch]; };
  return other < 0 ? part(f) : part(f) + part(other);
}

// What an id of sample b's bag counts for, beside its weight.
static inline float share_of(const Call* call, int64_t f, int64_t b) {
  return call->share && call->features[f].mean ? call->share[f * call->batch + b] : 1.0f;
}

// The same, for the driver to note.
static inline float count_share(const Call* call, int64_t f, int64_t b) {
  return 1.0f / static_cast<float>(length_of(call, f, b));
}

// Whether sample b has no id in feature f, and another feature has written its columns.
static inline bool adds_nothing(const Call* call, int64_t f, int64_t b) {
  const int64_t* offsets = call->offsets + f * call->batch + b;
  return call->features[f].adds && offsets[0] == offsets[1];
}

// Takes the pooled bag of sample b to where it belongs.
template <int W>
void put_bag(const Call* call, int64_t f, int64_t b, const float* sum) {
  float* out = call->out + b * call->columns + call->features[f].column;
  if (call->features[f].adds)
    for (int j = 0; j < W; j++) out[j] += sum[j];
  else
    std::copy(sum, sum + W, out);
}

// Pools bags [begin, end) of feature f, OUT columns of the output: `ask(key)` prefetches a row, `add(key, w, sum)` adds
// w times it to sum[W], `done(b, sum)` takes the bag of sample b.
template <int W, int OUT, class Ask, class Add, class Done>
void pool_bags(const Call* call, int64_t f, int64_t begin, int64_t end, Ask ask, Add add, Done done) {
  const FeatureCode& feature = call->features[f];
  const int64_t* offsets = call->offsets + f * call->batch;
  const int64_t last = offsets[end];
  for (int64_t i = offsets[begin]; i < std::min(last, offsets[begin] + AHEAD<W>); i++)
    ask(call->ids[i] + feature.key_base);
  // Where other tables' columns lie between them, processors do not see which bag comes next.
  const float* out = call->columns > OUT ? call->out + feature.column : nullptr;
  for (int64_t b = begin; b < end; b++) {
    float sum[W] = {};
    if (out && b + AHEAD<OUT> < end) prefetch_row<true>(out + (b + AHEAD<OUT>) * call->columns, OUT);
    for (int64_t i = offsets[b]; i < offsets[b + 1]; i++) {
      if (i + AHEAD<W> < last) ask(call->ids[i + AHEAD<W>] + feature.key_base);
      add(call->ids[i] + feature.key_base, call->weights ? call->weights[i] : 1.0f, sum);
    }
    // Summed, then divided, as torch does: the same bits.
    if (const int64_t length = feature.mean ? length_of(call, f, b) : 1; length > 1)
      for (int j = 0; j < W; j++) sum[j] /= static_cast<float>(length);
    done(b, sum);
  }
}

// Shares the bags of every feature of a table among the threads of the region, without a barrier.
template <class Pool>
void each_feature(const Table* table, const Call* call, Pool pool) {
  constexpr int64_t CHUNK = 256;
  const int64_t chunks = (call->batch + CHUNK - 1) / CHUNK;
#pragma omp for schedule(static) nowait
  for (int64_t task = 0; task < table->num_features * chunks; task++) {
    const int64_t begin = task % chunks * CHUNK;
    pool(table->features[task / chunks], begin, std::min(begin + CHUNK, call->batch));
  }
}

// Where positions are pooled to when every bag holds one id. Each pass has its own, a value that nothing points to:
// what it read through a table or a call, or of an object that a call is given, it would read again after every store.
class Places {
 public:
  Places(const Table* table, const Call* call) : call_(call), stride_(call->columns) {
    if (table->num_features != 1) return;
    const int64_t f = table->features[0];
    out_ = call->out + call->features[f].column, before_ = f * call->batch;
  }
  float* operator()(int64_t i) const { return out_ ? out_ + (i - before_) * stride_ : any(call_, i); }

 private:
  [[gnu::noinline]] static float* any(const Call* call, int64_t i) {
    const int64_t f = i / call->batch;
    return call->out + (i - f * call->batch) * call->columns + call->features[f].column;
  }
  const Call* call_;
  float* out_ = nullptr;  // of one feature
  int64_t stride_, before_ = 0;
};

// What a position of the batch sends to its row: its bag's gradient, times its weight or share of the bag.
struct Sender {
  const float* grad;
  float weight;
};

// The ids of a table's rows, and what their positions send: a value, like Places.
struct Senders {
  const int32_t *first, *perm;  // of each row its first id, and of each id its position
  int64_t ids;
  // Of one feature what position i sends is at + (i - before) * stride, or what its bag does; of several at is null.
  const float* at = nullptr;
  const int32_t* bag = nullptr;
  int64_t stride = 0, before = 0;
  const float *weights = nullptr, *share = nullptr;  // of positions, and of bags of a mean: null where all are 1
  const Call* call;

  Senders(const Table* table, const Call* c)
      : first(table->level[table->order - 1].first), perm(table->perm), ids(table->ids), call(c) {
    if (table->num_features != 1) return;
    const int64_t f = table->features[0];
    at = call->gradient[f].at, stride = call->gradient[f].stride;
    bag = call->bag, before = f * call->batch;
    weights = call->weights, share = call->features[f].mean ? call->share : nullptr;
  }
  const float* of_one(int64_t i) const { return at + ((bag ? bag[i] : i) - before) * stride; }
  const float* grad(int64_t i) const { return at ? of_one(i) : any(call, i).grad; }
  float weight(int64_t i) const {
    const float of_bag = share ? share[bag[i]] : 1.0f;
    return weights ? weights[i] * of_bag : of_bag;
  }
  Sender operator()(int64_t i) const {
    return at ? Sender{of_one(i), weight(i)} : any(call, i);
  }

 private:
  static Sender any(const Call* call, int64_t i) {
    const int64_t bag = call->bag ? call->bag[i] : i, f = bag / call->batch, b = bag - f * call->batch;
    const Gradient& g = call->gradient[f];
    const float share = share_of(call, f, b);
    return {g.at + b * g.stride, call->weights ? call->weights[i] * share : share};
  }
};

// grad[W] = the gradient of distinct row u: the sum over the bags that hold it, in the order of the batch. What comes
// next is asked for: beyond the row's own, where rows are taken IN_ORDER, that of the next rows.
template <int W, bool IN_ORDER = true>
[[gnu::always_inline]] inline void row_gradient(const Senders& from, int64_t u, float* grad) {
  const int32_t past = from.first[u + 1];
  const int64_t last = IN_ORDER ? from.ids : past;
  float sum[W] = {};
  // Two loops: what finding any sender needs would take the registers of the other one.
  if (from.at) {
    for (int32_t k = from.first[u]; k < past; k++) {
      if (k + AHEAD<W> < last) prefetch_row(from.of_one(from.perm[k + AHEAD<W>]), W);
      const int64_t i = from.perm[k];
      const float *const sent = from.of_one(i), weight = from.weight(i);
      for (int j = 0; j < W; j++) sum[j] += weight * sent[j];
    }
  } else {
    for (int32_t k = from.first[u]; k < past; k++) {
      if (k + AHEAD<W> < last) prefetch_row(from.grad(from.perm[k + AHEAD<W>]), W);
      const Sender sent = from(from.perm[k]);
      for (int j = 0; j < W; j++) sum[j] += sent.weight * sent.grad[j];
    }
  }
  std::copy(sum, sum + W, grad);
}

// Shares the distinct rows, each of which adds up the gradients of its ids.
template <class Act>
void share_rows(const Table* table, Act act) {
  const int32_t* first = table->level[table->order - 1].first;
  share_tasks(0, table->rows(), [&](int64_t u) { return u + first[u]; }, act);
}

// grad_weights of a feature's bags [begin, end): `dot(key, grad)` is a row times its bag's gradient.
template <class Dot>
void weight_gradients(const Call* call, int64_t f, int64_t begin, int64_t end, Dot dot) {
  const int64_t* offsets = call->offsets + f * call->batch;
  for (int64_t b = begin; b < end; b++) {
    const float* grad = call->gradient[f].at + b * call->gradient[f].stride;
    const float share = share_of(call, f, b);
    for (int64_t i = offsets[b]; i < offsets[b + 1]; i++) call->grad_weights[i] = share * dot(i, grad);
  }
}

template <int64_t KIND, int W>
void step_rows(const Table* table, int k, const int64_t* rows, int64_t count, const float* grads) {
  constexpr int64_t OWN = KIND == ROWWISE_ADAGRAD ? 1 : W;
  const Hyper rates = table->hyper[k];
  float *const param = table->param[k], *const state = KIND == SGD ? nullptr : table->state[k];
  float* const state2 = KIND == ADAM ? table->state2[k] : nullptr;
  for (int64_t i = 0; i < count; i++)
    step_row<KIND, W>(rates, param + rows[i] * W, grads + i * W, KIND == SGD ? nullptr : state + rows[i] * OWN,
                      KIND == ADAM ? state2 + rows[i] * OWN : nullptr);
}

// Finished rows of parameter k, their gradients side by side: written out, or the optimizer steps on them at once. A
// call, rare enough: loops that it were part of would run short of registers.
template <int W>
[[gnu::noinline]] void finish_rows(const Table* table, int k, const int64_t* rows, int64_t count, const float* grads) {
  if (table->optimizer == GRADIENT || (table->left >> k & 1)) {
    for (int64_t i = 0; i < count && table->grad[k]; i++)
      std::copy(grads + i * W, grads + (i + 1) * W, table->grad[k] + rows[i] * W);
    return;
  }
  switch (table->optimizer) {
    case SGD: return step_rows<SGD, W>(table, k, rows, count, grads);
    case ADAGRAD: return step_rows<ADAGRAD, W>(table, k, rows, count, grads);
    case ROWWISE_ADAGRAD: return step_rows<ROWWISE_ADAGRAD, W>(table, k, rows, count, grads);
    default: return step_rows<ADAM, W>(table, k, rows, count, grads);
  }
}

template <int W>
void finish_row(const Table* table, int k, int64_t row, const float* grad) {
  finish_rows<W>(table, k, &row, 1, grad);
}

// Finishes rows some at a time. One by one, what calls save on the stack fills a processor's store buffer, and it waits
// for the cache line of one row after another, where these are another core's.
template <int W>
class Finished {
 public:
  Finished(const Table* table, int k) : table_(table), k_(k) {}
  Finished(const Finished&) = delete;
  ~Finished() { finish_rows<W>(table_, k_, rows_, count_, grads_); }
  // Where the whole gradient of a row goes, before the next one is asked for.
  float* add(int64_t row) {
    if (count_ == AT_ONCE) finish_rows<W>(table_, k_, rows_, std::exchange(count_, 0), grads_);
    rows_[count_] = row;
    float* const grad = grads_ + W * count_++;
    if (POISON) std::fill_n(grad, W, NAN);
    return grad;
  }

 private:
  static constexpr int64_t AT_ONCE = std::max(1, 1024 / W);
  const Table* const table_;
  const int k_;
  int64_t count_ = 0, rows_[AT_ONCE];
  alignas(64) float grads_[AT_ONCE * W];
};

}  // namespace recemb
