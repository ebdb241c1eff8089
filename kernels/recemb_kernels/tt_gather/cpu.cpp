// Rows and core gradients of one tensor-train table, compiled for its ranks and dimension shape; the train itself and
// its forward are in recemb_train.h. Every node has one owner, and every core slice one in each part of the table, and
// sums in one order: results depend on neither the thread count nor, for the outputs, the slices and parts.
#include "recemb_train.h"

using namespace recemb;

namespace {

// The backward of one slice after another; core slices are finished in the last one.
template <bool MIRRORED>
struct TrainBackward : Train<MIRRORED> {
  using S = Sizes<MIRRORED>;
  using Base = Train<MIRRORED>;
  using Turned = typename Base::Turned;
  using Base::begin, Base::end, Base::call, Base::matrix, Base::product, Base::slice, Base::table;
  float* sent;          // [nodes of level SENDER, SENT]: see sent_at; of rows, first their gradients
  float* grad_rows;     // [rows, D] where rows send nothing
  float* tiles[ORDER];  // gradients of the slices of cores so far, of this part, when there are several slices
  float* begun[ORDER];  // of each of these, whether there is one yet
  bool summed;          // rows' gradients are there before the levels' passes

  TrainBackward(const Table* t, const Call* c, int64_t worker = 0, int64_t part = 0) : Base(t, c, worker) {
    summed = !S::ROWS_SEND || c->batch * c->columns * int64_t{sizeof(float)} > CACHE;
    const int64_t size = Base::worker_size(table, call);
    sent = table.spare + worker * size + (Base::keeps ? 0 : Base::all_products_size(table, false));
    grad_rows = sent + Base::most_nodes(table, S::SENDER) * S::SENT();
    float* at = table.spare + table.workers * size + part * Base::tiles_size(table);
    for (int l = 1; l < ORDER; l++) tiles[l] = at, at += table.level[l].touched * S::PACKED(l);
    for (int l = 1; l < ORDER; l++) begun[l] = at, at += table.level[l].touched;
  }

  // Where a node of level l puts what it sends, [M, padded K]: in place of what its first child has sent, which it has
  // read by then.
  template <int l>
  float* sent_at(int64_t node) const {
    static_assert(l <= S::SENDER);
    for (int k = l; k < S::SENDER; k++) node = table.level[k].first[node];
    return sent + (node - begin(S::SENDER)) * S::SENT();
  }

  // Where the gradient of row u is, in the order of the cores, once it is summed.
  float* grad_row(int64_t u) const {
    if constexpr (S::ROWS_SEND) return sent_at<LAST>(u);
    return grad_rows + (u - begin(LAST)) * D;
  }

  // A slice whose gradient is complete: stepped on, or its gradient written out. `room` is for one slice.
  template <int l>
  void finish(int64_t group, const float* tile, float* room) const {
    if constexpr (!S::AS_STORED(l)) Base::template repack<l>(tile, room);
    finish_row<S::WIDTH(l)>(&table, S::core(l), table.level[l].digit[group], S::AS_STORED(l) ? tile : room);
  }

  // The gradient of a group's slice: in `room` while one pass completes it.
  template <int l>
  float* tile_of(int64_t group, float* room) const {
    return table.slices > 1 ? tiles[l] + group * S::PACKED(l) : room;
  }

  // The gradient of row u, in the order of the cores.
  template <bool IN_ORDER>
  [[gnu::always_inline]] static void gradient_of_row(const Senders& from, int64_t u, float* to) {
    if constexpr (MIRRORED) {
      float straight[D];
      row_gradient<D, IN_ORDER>(from, u, straight);
      for (int j = 0; j < D; j++) to[j] = straight[COLUMN[j]];
    } else {
      row_gradient<D, IN_ORDER>(from, u, to);
    }
  }

  // Gradient of the product at a node of level d - 2, from its rows and their slices.
  void gradient_of_rows(int64_t node, float* to, Turned& turned) const {
    constexpr int M = S::M(LAST), Q = S::Q(LAST), KP = S::KP(LAST);
    const int64_t first = table.level[LAST - 1].first[node], past = table.level[LAST - 1].first[node + 1];
    for (int64_t u = first; u < past; u++) {
      const float *row = grad_row(u), *slice = Base::last_matrix(table.level[LAST].group[u], turned);
      const float* a[M];
      float* c[M];
      for (int m = 0; m < M; m++) a[m] = row + m * Q, c[m] = to + m * KP;
      if (u == first)
        multiply_rows<Q, KP, false>(M, a, slice, c);
      else
        multiply_rows<Q, KP, true>(M, a, slice, c);
    }
  }

  // The same at a node of level l, from what its children have sent.
  template <int l>
  void gradient_of_children(int64_t node, float* to) const {
    constexpr int WIDTH = S::M(l + 1) * S::KP(l + 1), L = lanes_of(WIDTH);
    static_assert(WIDTH == S::PRODUCT(l), "the products of level l");
    const int64_t first = table.level[l].first[node], past = table.level[l].first[node + 1];
    for (int64_t from = first; from < past; from += CHAIN) {
      const int64_t n = std::min<int64_t>(CHAIN, past - from);
      const float* sends[CHAIN];
      for (int64_t i = 0; i < n; i++) sends[i] = sent_at<l + 1>(from + i);
      for (int j = 0; j < WIDTH; j += L) {
        auto sum = load<L>(sends[0] + j);
        for (int64_t i = 1; i < n; i++) sum += load<L>(sends[i] + j);
        store<L>(to + j, from == first ? sum : load<L>(to + j) + sum);
      }
    }
  }

  // Whether all of a row's gradient is read by the time that what the row sends, if anything, takes its place.
  static constexpr bool READ_IN_PLACE = !S::ROWS_SEND || (S::M(LAST) == 1 && S::Q(LAST) <= 2 * CHAIN &&
                                                          S::KP(LAST) <= PANEL * lanes_of(S::KP(LAST)));

  // The same, or the gradient of a row: in `to`, or where it is already.
  template <int l>
  const float* node_gradient(const Senders& from, int64_t node, float* to, Turned& turned) const {
    if constexpr (l == LAST) {
      if (summed && READ_IN_PLACE) return grad_row(node);
      if (summed)
        std::copy(grad_row(node), grad_row(node) + D, to);
      else
        gradient_of_row<false>(from, node, to);
    } else if constexpr (l < S::SENDER) {
      gradient_of_children<l>(node, to);
    } else if constexpr (ORDER == 2) {
      std::copy(sent_at<0>(node), sent_at<0>(node) + S::PRODUCT(0), to);
    } else {
      gradient_of_rows(node, to, turned);
    }
    return to;
  }

  // Asks for what a node of level l, or the first below it, has been sent or sends, and for the product above a row.
  template <int l>
  [[gnu::always_inline]] void ask(const Senders& from, int64_t node) const {
    if constexpr (l <= S::SENDER) prefetch_row<true>(sent_at<l>(node), S::SENT());
    if constexpr (l == LAST) {
      prefetch_row(product(l - 1, table.level[l].parent[node]), S::PRODUCT(l - 1));
      if (!S::ROWS_SEND) prefetch_row(grad_row(node), D);
      if (summed) return;
      const int64_t begin = from.first[node], past = std::min<int64_t>(begin + IDS_AHEAD, from.first[node + 1]);
      for (int64_t k = begin; k < past; k++) prefetch_row(from.grad(from.perm[k]), D);
    }
  }

  // Rows' gradients in the order of the rows, whose ids stand together in `perm`: what a pass over the last digits
  // skips about in. Where the batch's gradient lies in a core's own cache, that costs less than one pass more. What that
  // pass reads is asked for: rows of one prefix stand together here.
  void sum_rows() const {
    const Senders from(&table, &call);
    const auto cost = [&](int64_t u) { return u + from.first[u]; };
    share_tasks(begin(LAST), end(LAST), cost, [=](int64_t u) {
      if (u + NODES_AHEAD < end(LAST)) ask<LAST>(from, u + NODES_AHEAD);
      gradient_of_row<true>(from, u, grad_row(u));
    });
#pragma omp barrier
  }

  // Run by run, the nodes of level l that share a slice, rows in the last one: their gradients, what they send to the
  // level above (their gradient times the transposed slice), and the gradient of the slice, which is stepped on at once.
  template <int l>
  void level_gradients() const {
    constexpr int K = S::K(l), KP = S::KP(l), N = S::N(l), M = S::M(l), AT_ONCE = nodes_at_once<S>(l);
    constexpr bool TRANSPOSED = l == LAST && !S::BY_ROWS;  // the slices already are
    constexpr bool SENDS = l <= S::SENDER;
    const Level& level = table.level[l];
    const int64_t first = begin(l), last = level.past_run[slice], nodes = end(l);
    float *const tile_room = scratch(call, TILE), *const slice_room = scratch(call, SLICE);
    float* const grads = scratch(call, GRADIENTS);
    const Senders senders(&table, &call);
    Turned turned;
    const auto cost = [&](int64_t run) {
      const int64_t of_child = l == LAST && summed ? 0 : l < LAST && l == S::SENDER ? ROW_COST : 1;
      return Base::template cost_of_runs<l>(run) + of_child * level.run_below[run];
    };
    share_tasks(first, last, cost, [&, senders](int64_t run) {
      const int64_t group = level.run_group[run], start = level.run_start[run], past = level.run_start[run + 1];
      forget(call);
      if (l == LAST && table.slices == 1 && table.optimizer != GRADIENT && run + SLICES_AHEAD < last)
        prefetch_row<true, SLICE_LINES>(Base::slice_of(l, level.run_group[run + SLICES_AHEAD]), S::WIDTH(l));
      const float *straight = nullptr, *transposed = slice_room;
      // For these, transposing takes longer than the product. Not for rows: sums of few would have other bits.
      const bool few = l < LAST && past - start <= FEW;
      if constexpr (SENDS && TRANSPOSED) {
        transposed = Base::last_matrix(group, turned);
      } else if constexpr (SENDS) {
        straight = matrix(l, group);
        if (!few && KP > K) std::fill(slice_room, slice_room + N * KP, 0.0f);
        if (!few) transpose<K, N, KP>(straight, slice_room);
      }
      float* tile = tile_of<l>(group, tile_room);
      for (int64_t from = start; from < past; from += AT_ONCE) {
        const int64_t to = std::min<int64_t>(from + AT_ONCE, past);
        const float *above[AT_ONCE * M], *own[AT_ONCE * M];
        float* sends[AT_ONCE * M];
        int64_t rows = 0;
        for (int64_t k = from; k < to; k++) {
          const int64_t node = level.by_digit[k];
          if (k + NODES_AHEAD < nodes) ask<l>(senders, level.by_digit[k + NODES_AHEAD]);
          const float* const grad = node_gradient<l>(senders, node, grads + (k - from) * (M * N), turned);
          const float* const product_above = product(l - 1, level.parent[node]);
          for (int m = 0; m < M; m++) above[rows + m] = product_above + m * KP, own[rows + m] = grad + m * N;
          if constexpr (SENDS)
            for (int m = 0; m < M; m++) sends[rows + m] = sent_at<l>(node) + m * KP;
          rows += M;
        }
        if constexpr (SENDS && l < LAST)
          if (few)
            for (int64_t r = 0; r < rows; r += M) {
              if (KP > K) std::fill(sends[r], sends[r] + M * KP, 0.0f);
              dot_rows<M, N, K, KP>(own[r], straight, sends[r]);
            }
        const bool add = from > start || (table.slices > 1 && begun[l][group] != 0);
        if constexpr (TRANSPOSED)
          add_outer<N, KP>(rows, own, above, tile, add);
        else
          add_outer<K, N>(rows, above, own, tile, add);
        if (SENDS && !few) multiply_rows<N, KP, false>(rows, own, transposed, sends);
      }
      if (table.slices == 1)
        finish<l>(group, tile, slice_room);
      else
        begun[l][group] = 1;
    });
#pragma omp barrier
  }

  // Levels l .. 0.
  template <int l>
  void levels_below() const {
    if constexpr (l > 0) {
      level_gradients<l>();
      levels_below<l - 1>();
    } else {
      {
        float* const grad = scratch(call, GRADIENTS);
        const Senders from(&table, &call);
        Turned turned;
        Finished<S::WIDTH(0)> finished(&table, S::core(0));
#pragma omp for schedule(static) nowait
        for (int64_t node = begin(0); node < end(0); node++) {
          forget(call);
          float* const row = finished.add(table.level[0].digit[node]);
          node_gradient<0>(from, node, S::AS_STORED(0) ? row : grad, turned);
          if constexpr (!S::AS_STORED(0)) Base::template repack<0>(grad, row);
        }
      }
#pragma omp barrier
    }
  }

  // All levels, each of which reads its slices and the products above it before these are stepped on.
  void all_levels() const {
    if constexpr (S::ROWS_SEND) {
      levels_below<LAST>();
    } else {
      // What reads the last core's slices comes before they are stepped on.
      if constexpr (ORDER == 2) {
        Turned turned;
        const auto cost = [&](int64_t node) { return node + ROW_COST * table.level[0].first[node]; };
        share_tasks(begin(0), end(0), cost, [&](int64_t node) { gradient_of_rows(node, sent_at<0>(node), turned); });
#pragma omp barrier
      } else {
        level_gradients<LAST - 1>();
      }
      level_gradients<LAST>();
      levels_below<std::max(LAST - 2, 0)>();
    }
  }

  // Of the first part, to which the others' are added.
  template <int l>
  void finish_tiles() const {
    const int64_t next = Base::tiles_size(table);
#pragma omp for schedule(static) nowait
    for (int64_t g = 0; g < table.level[l].touched; g++) {
      float* tile = tiles[l] + g * S::PACKED(l);
      if (begun[l][g] == 0) std::fill_n(tile, S::PACKED(l), 0.0f);
      for (int64_t part = 1; part < table.parts; part++) {
        if (begun[l][part * next + g] == 0) continue;
        for (int j = 0; j < S::PACKED(l); j++) tile[j] += tile[part * next + j];
      }
      finish<l>(g, tile, scratch(call, SLICE));
    }
    if constexpr (l < LAST) finish_tiles<l + 1>();
  }

  void weight_gradient() const {
    each_feature(&table, &call, [&](int64_t f, int64_t first, int64_t last) {
      weight_gradients(&call, f, first, last, [&](int64_t i, const float* grad) {
        const float* row = Base::rows + int64_t{call.slot[i]} * D;
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int j = 0; j < D; j++) dot += row[j] * grad[j];
        return dot;
      });
    });
  }

  // One id a bag has written its row to no list: out = w * row was all. Rows are dotted once more instead.
  void one_hot_weight_gradient() const {
    const Senders from(&table, &call);
    Base::each_row([](int64_t) -> float* { return nullptr; }, [&](int64_t u, const float* row) {
      for (int32_t k = from.first[u]; k < from.first[u + 1]; k++) {
        const float* grad = from(from.perm[k]).grad;
        float dot = 0;
        for (int j = 0; j < D; j++) dot += row[j] * grad[j];
        call.grad_weights[from.perm[k]] = dot;
      }
    });
#pragma omp barrier  // before slices are stepped on
  }

  void backward() {
    const bool several = table.slices > 1;
    if (call.grad_weights && call.bag) weight_gradient();
    const auto alike = [](int64_t) { return 0; };
    each_alone(table, call, table.parts, alike, [&](const Call* own, int64_t worker, int64_t part) {
      TrainBackward train(&table, own, worker, part);
      if (several) {
#pragma omp single
        for (int l = 1; l < ORDER; l++) std::fill_n(train.begun[l], table.level[l].touched, 0.0f);
      }
      for (train.slice = table.part[part]; train.slice < table.part[part + 1]; train.slice++) train.backward_of_slice();
    });
    if (several) finish_tiles<1>();
  }

  void backward_of_slice() {
    if (!Base::keeps) Base::template multiply_level<1>();
    if (call.grad_weights && !call.bag) one_hot_weight_gradient();
    if (summed) sum_rows();
    all_levels();
  }
};

template <bool MIRRORED>
int64_t kept(const Table* table, const Call* call) {
  return Train<MIRRORED>::kept_size(*table, *call);
}
template <bool MIRRORED>
int64_t spare(const Table* table, const Call* call) {
  return Train<MIRRORED>::spare_size(*table, *call);
}
template <bool MIRRORED>
void forward(const Table* table, const Call* call) {
  Train<MIRRORED>(table, call).forward();
}
template <bool MIRRORED>
void backward(const Table* table, const Call* call) {
  TrainBackward<MIRRORED>(table, call).backward();
}

}  // namespace

extern "C" Functions recemb_kernel = {kept<false>, spare<false>, forward<false>,
                                       TRAINS ? backward<false> : nullptr, OWN};
extern "C" Functions recemb_kernel_mirrored = {kept<true>, spare<true>, forward<true>,
                                                TRAINS ? backward<true> : nullptr, OWN};
