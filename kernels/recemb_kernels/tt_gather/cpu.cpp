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
  using Base::begin, Base::end, Base::call, Base::matrix, Base::product, Base::slice, Base::table;
  float* grad_rows;
  float* grads[ORDER];  // of the products, levels 0 .. d - 2
  float* sent[ORDER];   // what each node of levels 1 .. d - 2 sends to the level above: [M, padded K]
  float* tiles[ORDER];  // gradients of the slices so far, when there are several slices

  TrainBackward(const Table* t, const Call* c) : Base(t, c) {
    float* at = table.spare + (Base::keeps_products(table) ? 0 : Base::all_products_size(table));
    grad_rows = at, at += Base::most_nodes(table, LAST) * D;
    for (int l = 0; l < LAST; l++) grads[l] = at, at += Base::most_nodes(table, l) * S::PRODUCT(l);
    for (int l = 1; l < LAST; l++) sent[l] = at, at += Base::most_nodes(table, l) * S::M(l) * S::KP(l);
    if (table.slices > 1)
      for (int l = 1; l < ORDER; l++) tiles[l] = at, at += table.level[l].touched * S::PACKED(l);
  }

  float* grad(int l, int64_t node) const { return grads[l] + (node - begin(l)) * S::PRODUCT(l); }
  float* grad_row(int64_t u) const { return grad_rows + (u - begin(LAST)) * D; }
  float* sent_at(int l, int64_t node) const { return sent[l] + (node - begin(l)) * (S::M(l) * S::KP(l)); }

  template <int l>
  void finish(int64_t group, const float* tile) const {
    constexpr int core = S::core(l);
    const int64_t digit = table.level[l].digit[group];
    const float* grad = tile;
    if constexpr (!S::IN_PLACE(l)) {
      float* slice_grad = scratch(1);
      Base::template each_element<l>([&](int p, int s) { slice_grad[s] = tile[p]; });
      grad = slice_grad;
    }
    finish_row<S::WIDTH(l)>(&table, core, digit, grad);
  }

  // Gradients of the slices of core l: each run of nodes with one digit adds to that digit's tile.
  template <int l, class Add>
  void each_tile(Add add) const {
    const Level& level = table.level[l];
    const int64_t first = level.slice_run[slice], last = level.slice_run[slice + 1];
    const bool alone = table.slices == 1;
    const int64_t at_once = tasks_at_once(last - first);
#pragma omp for schedule(dynamic, at_once) nowait
    for (int64_t run = first; run < last; run++) {
      const int64_t group = level.run_group[run];
      float* tile = alone ? scratch(0) : tiles[l] + group * S::PACKED(l);
      if (alone) std::fill(tile, tile + S::PACKED(l), 0.0f);
      for (int64_t from = level.run_start[run]; from < level.run_start[run + 1]; from += PIECE)
        add(from, std::min<int64_t>(from + PIECE, level.run_start[run + 1]), tile);
      if (alone) finish<l>(group, tile);
    }
  }

  // Row gradients, and those of the last products.
  void send_rows() const {
    const Level& level = table.level[LAST - 1];
    const Level& last = table.level[LAST];
    constexpr int M = S::M(LAST), Q = S::Q(LAST), KP = S::KP(LAST);
#pragma omp for schedule(dynamic, NODES)
    for (int64_t node = begin(LAST - 1); node < end(LAST - 1); node++) {
      const float* a[M];
      float *c[M], *to = grad(LAST - 1, node);
      std::fill(to, to + M * KP, 0.0f);
      for (int64_t u = level.first[node]; u < level.first[node + 1]; u++) {
        float* row = grad_row(u);
        if constexpr (MIRRORED) {
          float straight[D];
          row_gradient<D>(&table, &call, u, straight);
          for (int j = 0; j < D; j++) row[j] = straight[COLUMN[j]];
        } else {
          row_gradient<D>(&table, &call, u, row);
        }
        for (int m = 0; m < M; m++) a[m] = row + m * Q, c[m] = to + m * KP;
        multiply_rows<Q, KP, true>(M, a, matrix(LAST, last.group[u]), c);
      }
    }
  }

  void last_tiles() const {
    const Level& last = table.level[LAST];
    constexpr int M = S::M(LAST), Q = S::Q(LAST), KP = S::KP(LAST);
    each_tile<LAST>([&](int64_t from, int64_t to, float* tile) {
      const float *a[PIECE * M], *c[PIECE * M];
      int64_t rows = 0;
      for (int64_t k = from; k < to; k++) {
        const int64_t u = last.by_digit[k];
        if (k + 4 < last.nodes) {
          const int64_t next = last.by_digit[k + 4];
          prefetch_row(product(LAST - 1, last.parent[next]), M * KP), prefetch_row(grad_row(next), D);
        }
        const float *grad = grad_row(u), *above = product(LAST - 1, last.parent[u]);
        for (int m = 0; m < M; m++, rows++) a[rows] = grad + m * Q, c[rows] = above + m * KP;
      }
      add_outer<Q, KP>(rows, a, c, tile);
    });
  }

  // What the nodes of level l send to the products above them: their gradient times the transposed slice.
  template <int l>
  void send_up() const {
    constexpr int K = S::K(l), KP = S::KP(l), N = S::N(l), M = S::M(l);
    const Level& level = table.level[l];
    const int64_t first = level.slice_piece[slice], last = level.slice_piece[slice + 1];
    const int64_t at_once = tasks_at_once(last - first);
#pragma omp for schedule(dynamic, at_once)
    for (int64_t p = first; p < last; p++) {
      const int64_t from = level.piece_start[p], to = level.piece_start[p + 1];
      const float* straight = matrix(l, level.group[level.by_digit[from]]);
      if (to - from <= FEW) {  // transposing would take longer than the product
        for (int64_t k = from; k < to; k++) {
          const int64_t node = level.by_digit[k];
          float* sends = sent_at(l, node);
          if (KP > K) std::fill(sends, sends + M * KP, 0.0f);
          dot_rows<M, N, K, KP>(grad(l, node), straight, sends);
        }
        continue;
      }
      float* transposed = scratch(1);
      if (KP > K) std::fill(transposed, transposed + N * KP, 0.0f);
      transpose<K, N, KP>(straight, transposed);
      const float* a[PIECE * M];
      float* c[PIECE * M];
      int64_t rows = 0;
      for (int64_t k = from; k < to; k++) {
        const int64_t node = level.by_digit[k];
        for (int m = 0; m < M; m++, rows++) a[rows] = grad(l, node) + m * N, c[rows] = sent_at(l, node) + m * KP;
      }
      multiply_rows<N, KP, false>(rows, a, transposed, c);
    }
  }

  template <int l>
  void middle_tiles() const {
    const Level& level = table.level[l];
    each_tile<l>([&](int64_t from, int64_t to, float* tile) {
      const float* a[PIECE * S::M(l)];
      float* c[PIECE * S::M(l)];
      const int64_t rows = Base::template pointers<l>(
          from, to, [&](int64_t node) { return product(l - 1, level.parent[node]); },
          [&](int64_t node) { return grad(l, node); }, a, c);
      add_outer<S::K(l), S::N(l)>(rows, a, c, tile);
    });
  }

  // Gradient of the product of cores 0 .. l - 1: the sum of what its children sent.
  template <int l>
  void gather_children() const {
    constexpr int WIDTH = S::M(l) * S::KP(l);
    static_assert(WIDTH == S::PRODUCT(l - 1), "the products of level l - 1");
    const Level& above = table.level[l - 1];
#pragma omp for schedule(static)
    for (int64_t node = begin(l - 1); node < end(l - 1); node++) {
      float* to = grad(l - 1, node);
      std::fill(to, to + WIDTH, 0.0f);
      for (int64_t child = above.first[node]; child < above.first[node + 1]; child++) {
        const float* from = sent_at(l, child);
        for (int j = 0; j < WIDTH; j++) to[j] += from[j];
      }
    }
  }

  template <int l>
  void backward_level() const {
    if constexpr (l > 0) {
      send_up<l>();  // reads the slices that the tiles then update
      middle_tiles<l>();
      gather_children<l>();
      backward_level<l - 1>();
    } else {
#pragma omp for schedule(static)
      for (int64_t node = begin(0); node < end(0); node++) finish<0>(node, grad(0, node));
    }
  }

  template <int l>
  void finish_tiles() const {
#pragma omp for schedule(static) nowait
    for (int64_t g = 0; g < table.level[l].touched; g++) finish<l>(g, tiles[l] + g * S::PACKED(l));
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
    const Level& level = table.level[LAST - 1];
    const Level& last = table.level[LAST];
#pragma omp for schedule(static) nowait
    for (int64_t node = begin(LAST - 1); node < end(LAST - 1); node++)
      for (int64_t u = level.first[node]; u < level.first[node + 1]; u++) {
        float row[D];
        dot_rows<S::M(LAST), S::KP(LAST), S::Q(LAST)>(product(LAST - 1, node), matrix(LAST, last.group[u]), row);
        for (int64_t k = last.first[u]; k < last.first[u + 1]; k++) {
          const float* grad = sender_of(&table, &call, table.perm[k]).grad;
          float dot = 0;
          for (int j = 0; j < D; j++) dot += row[j] * grad[MIRRORED ? COLUMN[j] : j];
          call.grad_weights[table.perm[k]] = dot;
        }
      }
  }

  void backward() {
    const bool several = table.slices > 1;
    if (several) {
#pragma omp single
      for (int l = 1; l < ORDER; l++) std::fill(tiles[l], tiles[l] + table.level[l].touched * S::PACKED(l), 0.0f);
    }
    if (call.grad_weights && call.bag) weight_gradient();
    for (slice = 0; slice < table.slices; slice++) {
      if (several) Base::template multiply_level<0>();
      if (call.grad_weights && !call.bag) weight_gradient();
      send_rows();
      last_tiles();
      if (ORDER == 2) {  // core 0 is read by the tiles, and updated next
#pragma omp barrier
      }
      backward_level<LAST - 1>();
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
                                       TRAINS ? backward<false> : nullptr};
extern "C" Functions recemb_kernel_mirrored = {kept<true>, spare<true>, forward<true>,
                                                TRAINS ? backward<true> : nullptr};
