// Rows and core gradients of one tensor-train table, compiled for its ranks and dimension shape; the train itself and
// its forward are in recemb_train.h. Every node and every core slice has one owner and sums in one order: results
// depend on neither the thread count nor, for the outputs, the slices.
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
  float* grad_rows;
  float* core0_grads;   // of a train of two cores, which steps on core 0 last
  float* sent[ORDER];   // what each node of levels 1 .. d - 2 sends to the level above: [M, padded K]
  float* tiles[ORDER];  // gradients of the slices so far, when there are several slices
  bool summed;          // rows' gradients are there when those of the products above them are computed

  TrainBackward(const Table* t, const Call* c) : Base(t, c) {
    summed = ORDER > 2 && c->batch * c->columns * int64_t{sizeof(float)} > CACHE;
    float* at = table.spare + (Base::keeps_products(table) ? 0 : Base::all_products_size(table));
    grad_rows = at, at += Base::most_nodes(table, LAST) * D;
    if constexpr (ORDER == 2) core0_grads = at, at += Base::most_nodes(table, 0) * S::PRODUCT(0);
    for (int l = 1; l < LAST; l++) sent[l] = at, at += Base::most_nodes(table, l) * S::M(l) * S::KP(l);
    if (table.slices > 1)
      for (int l = 1; l < ORDER; l++) tiles[l] = at, at += table.level[l].touched * S::PACKED(l);
  }

  float* grad_row(int64_t u) const { return grad_rows + (u - begin(LAST)) * D; }
  float* core0_grad(int64_t node) const { return core0_grads + (node - begin(0)) * S::PRODUCT(0); }
  float* sent_at(int l, int64_t node) const { return sent[l] + (node - begin(l)) * (S::M(l) * S::KP(l)); }

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
  const float* gradient_of_row(int64_t u) const {
    float* row = grad_row(u);
    if constexpr (MIRRORED) {
      float straight[D];
      row_gradient<D>(&table, &call, u, straight);
      for (int j = 0; j < D; j++) row[j] = straight[COLUMN[j]];
    } else {
      row_gradient<D>(&table, &call, u, row);
    }
    return row;
  }

  const float* row_sum(int64_t u) const { return summed ? grad_row(u) : gradient_of_row(u); }

  // Rows' gradients in the order of the rows, whose ids stand together in `perm`: what a pass over the middle digits
  // skips about in. Where the batch's gradient lies in a core's own cache, that costs less than one pass more.
  void sum_rows() const {
    const auto cost = [&](int64_t u) { return u + table.level[LAST].first[u]; };
    share_tasks(begin(LAST), end(LAST), cost, [&](int64_t u) { gradient_of_row(u); });
#pragma omp barrier
  }

  // Gradient of the product at a node of level d - 2, and of the rows below it.
  void gradient_of_rows(int64_t node, float* to, Turned& turned) const {
    constexpr int M = S::M(LAST), Q = S::Q(LAST), K = S::K(LAST), KP = S::KP(LAST);
    const int64_t first = table.level[LAST - 1].first[node], last = table.level[LAST - 1].first[node + 1];
    if constexpr (S::BY_ROWS) {
      if (KP > K) std::fill(to, to + M * KP, 0.0f);
      // Of each sum no more products in a chain than elsewhere.
      constexpr int64_t AT_ONCE = std::max(1, 2 * CHAIN * lanes_of(Q) / Q);
      const float *rows[AT_ONCE], *slices[AT_ONCE];
      for (int64_t from = first; from < last; from += AT_ONCE) {
        const int64_t n = std::min(AT_ONCE, last - from);
        for (int64_t i = 0; i < n; i++)
          rows[i] = row_sum(from + i), slices[i] = Base::last_slice(table.level[LAST].group[from + i]);
        if (from == first)
          dot_rows<M, Q, K, KP, false>(n, rows, slices, to);
        else
          dot_rows<M, Q, K, KP, true>(n, rows, slices, to);
      }
    } else {
      const float* a[M];
      float* c[M];
      for (int64_t u = first; u < last; u++) {
        const float *row = row_sum(u), *slice = Base::last_matrix(table.level[LAST].group[u], turned);
        for (int m = 0; m < M; m++) a[m] = row + m * Q, c[m] = to + m * KP;
        if (u == first)
          multiply_rows<Q, KP, false>(M, a, slice, c);
        else
          multiply_rows<Q, KP, true>(M, a, slice, c);
      }
    }
  }

  // Gradient of the product at a node of level l: what its rows or its children send.
  template <int l>
  void node_gradient(int64_t node, float* to, Turned& turned) const {
    if constexpr (l == LAST - 1) {
      gradient_of_rows(node, to, turned);
    } else {
      constexpr int WIDTH = S::M(l + 1) * S::KP(l + 1);
      static_assert(WIDTH == S::PRODUCT(l), "the products of level l");
      std::fill(to, to + WIDTH, 0.0f);
      for (int64_t child = table.level[l].first[node]; child < table.level[l].first[node + 1]; child++) {
        const float* from = sent_at(l + 1, child);
        for (int j = 0; j < WIDTH; j++) to[j] += from[j];
      }
    }
  }

  // Run by run, the nodes of level l that share a slice: their gradients, what they send to the level above (their
  // gradient times the transposed slice), and the gradient of the slice, which is stepped on at once.
  template <int l>
  void level_gradients() const {
    constexpr int K = S::K(l), KP = S::KP(l), N = S::N(l), M = S::M(l), AT_ONCE = nodes_at_once<S>(l);
    const Level& level = table.level[l];
    const int64_t first = level.slice_run[slice], last = level.slice_run[slice + 1];
    float *const tile_room = scratch(call, TILE), *const slice_room = scratch(call, SLICE);
    float* const grads = scratch(call, GRADIENTS);
    Turned turned;
    const auto cost = [&](int64_t run) {
      const int64_t whole = Base::template cost_of_runs<l>(run);
      return l == LAST - 1 && summed ? whole - level.run_ids[run] : whole;
    };
    share_tasks(first, last, cost, [&](int64_t run) {
      const int64_t group = level.run_group[run], start = level.run_start[run], past = level.run_start[run + 1];
      forget(call);
      const float* straight = matrix(l, group);
      const bool few = past - start <= FEW;  // transposing would take longer than the product
      if (!few) {
        if (KP > K) std::fill(slice_room, slice_room + N * KP, 0.0f);
        transpose<K, N, KP>(straight, slice_room);
      }
      float* tile = tile_of<l>(group, tile_room);
      for (int64_t from = start; from < past; from += AT_ONCE) {
        const int64_t to = std::min<int64_t>(from + AT_ONCE, past);
        const float *above[AT_ONCE * M], *own[AT_ONCE * M];
        float* sends[AT_ONCE * M];
        int64_t rows = 0;
        for (int64_t k = from; k < to; k++) {
          const int64_t node = level.by_digit[k];
          float* grad = grads + (k - from) * (M * N);
          node_gradient<l>(node, grad, turned);
          const float* product_above = product(l - 1, level.parent[node]);
          for (int m = 0; m < M; m++, rows++)
            above[rows] = product_above + m * KP, own[rows] = grad + m * N, sends[rows] = sent_at(l, node) + m * KP;
        }
        if (few) {
          for (int64_t r = 0; r < rows; r += M) {
            if (KP > K) std::fill(sends[r], sends[r] + M * KP, 0.0f);
            dot_rows<M, N, K, KP>(own[r], straight, sends[r]);
          }
        } else {
          multiply_rows<N, KP, false>(rows, own, slice_room, sends);
        }
        add_outer<K, N>(rows, above, own, tile, table.slices > 1 || from > start);
      }
      if (table.slices == 1) finish<l>(group, tile, slice_room);
    });
#pragma omp barrier
  }

  void last_tiles() const {
    const Level& last = table.level[LAST];
    constexpr int M = S::M(LAST), Q = S::Q(LAST), KP = S::KP(LAST);
    const int64_t first = last.slice_run[slice], past = last.slice_run[slice + 1];
    float *const tile_room = scratch(call, TILE), *const slice_room = scratch(call, SLICE);
    const bool steps = table.slices == 1 && table.optimizer != GRADIENT;
    share_tasks(first, past, [&](int64_t run) { return Base::template cost_of_runs<LAST>(run); }, [&](int64_t run) {
      const int64_t group = last.run_group[run];
      forget(call);
      if (steps && run + SLICES_AHEAD < past)
        prefetch_row<true>(Base::slice_of(LAST, last.run_group[run + SLICES_AHEAD]), S::WIDTH(LAST));
      float* tile = tile_of<LAST>(group, tile_room);
      for (int64_t from = last.run_start[run]; from < last.run_start[run + 1]; from += PIECE) {
        const float *a[PIECE * M], *c[PIECE * M];
        int64_t rows = 0;
        for (int64_t k = from; k < std::min<int64_t>(from + PIECE, last.run_start[run + 1]); k++) {
          const int64_t u = last.by_digit[k];
          if (k + ROWS_AHEAD < last.nodes) {
            const int64_t next = last.by_digit[k + ROWS_AHEAD];
            prefetch_row(product(LAST - 1, last.parent[next]), M * KP), prefetch_row(grad_row(next), D);
          }
          const float *grad = grad_row(u), *above = product(LAST - 1, last.parent[u]);
          for (int m = 0; m < M; m++, rows++) a[rows] = grad + m * Q, c[rows] = above + m * KP;
        }
        const bool add = table.slices > 1 || from > last.run_start[run];
        if constexpr (S::BY_ROWS)
          add_outer<S::K(LAST), Q>(rows, c, a, tile, add);
        else
          add_outer<Q, KP>(rows, a, c, tile, add);
      }
      if (table.slices == 1) finish<LAST>(group, tile, slice_room);
    });
  }

  // Levels l .. 0.
  template <int l>
  void levels_below() const {
    if constexpr (l > 0) {
      level_gradients<l>();
      levels_below<l - 1>();
    } else {
      float *const room = scratch(call, SLICE), *const grad = scratch(call, GRADIENTS);
      Turned turned;
#pragma omp for schedule(static)
      for (int64_t node = begin(0); node < end(0); node++) {
        forget(call);
        node_gradient<0>(node, grad, turned);
        finish<0>(node, grad, room);
      }
    }
  }

  // What the rows below the nodes of level d - 2 before this one cost.
  int64_t cost_of_nodes(int64_t node) const {
    const int64_t row = table.level[LAST - 1].first[node];
    return node + ROW_COST * row + table.level[LAST].first[row];
  }

  // Core 0 is read by the gradients of core 1, and stepped on after them.
  void two_cores() const {
    Turned turned;
    share_tasks(begin(0), end(0), [&](int64_t node) { return cost_of_nodes(node); }, [&](int64_t node) {
      gradient_of_rows(node, core0_grad(node), turned);
    });
#pragma omp barrier
    last_tiles();
#pragma omp barrier
    float* const room = scratch(call, SLICE);
#pragma omp for schedule(static)
    for (int64_t node = begin(0); node < end(0); node++) {
      forget(call);
      finish<0>(node, core0_grad(node), room);
    }
  }

  template <int l>
  void finish_tiles() const {
#pragma omp for schedule(static) nowait
    for (int64_t g = 0; g < table.level[l].touched; g++)
      finish<l>(g, tiles[l] + g * S::PACKED(l), scratch(call, SLICE));
    if constexpr (l < LAST) finish_tiles<l + 1>();
  }

  void weight_gradient() const {
    if (!call.bag) return one_hot_weight_gradient();
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
    const Level& last = table.level[LAST];
    Base::each_row([](int64_t) -> float* { return nullptr; }, [&](int64_t u, const float* row) {
      for (int64_t k = last.first[u]; k < last.first[u + 1]; k++) {
        const float* grad = sender_of(&table, &call, table.perm[k]).grad;
        float dot = 0;
        for (int j = 0; j < D; j++) dot += row[j] * grad[j];
        call.grad_weights[table.perm[k]] = dot;
      }
    });
  }

  void backward() {
    const bool several = table.slices > 1;
    if (several) {
#pragma omp single
      for (int l = 1; l < ORDER; l++) std::fill(tiles[l], tiles[l] + table.level[l].touched * S::PACKED(l), 0.0f);
    }
    if (call.grad_weights && call.bag) weight_gradient();
    for (slice = 0; slice < table.slices; slice++) {
      if (several) Base::template multiply_level<1>();
      if (call.grad_weights && !call.bag) weight_gradient();
      if constexpr (ORDER == 2) {
        two_cores();
      } else {
        if (summed) sum_rows();
        level_gradients<LAST - 1>();  // reads the last core's slices, which its tiles then update
        last_tiles();
        levels_below<LAST - 2>();
      }
    }
    if (several) finish_tiles<1>();
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
