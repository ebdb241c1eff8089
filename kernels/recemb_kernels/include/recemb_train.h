// A tensor train of one shape, -DDIMS=q_1,...,q_d -DRANKS=1,R_1,...,R_{d-1},1, and its forward pass. Every method is
// called by all threads of the driver's parallel region, which share the work.
//
// Mirrored, the same train is read from its other end: core l is the transpose of core d - 1 - l, and a row's
// columns come out in another order.
#pragma once
#include <algorithm>
#include <array>
#include <iterator>

#include "recemb_alone.h"
#include "recemb_bags.h"
#include "recemb_storage.h"
#include "recemb_tree.h"
#include "recemb_vector.h"

namespace recemb {

// Of this library alone: every table's library has a train of its own under the same names.
namespace {

constexpr int DIM[] = {DIMS};
constexpr int RANK[] = {RANKS};
constexpr int ORDER = sizeof(DIM) / sizeof(DIM[0]);
constexpr int LAST = ORDER - 1;
static_assert(sizeof(RANK) / sizeof(RANK[0]) == ORDER + 1, "one rank more than cores");

// Sizes of the train as read from its left end, or from its right end.
template <bool MIRRORED>
struct Sizes {
  static constexpr int core(int l) { return MIRRORED ? LAST - l : l; }
  static constexpr int Q(int l) { return DIM[core(l)]; }
  static constexpr int K(int l) { return MIRRORED ? RANK[core(l) + 1] : RANK[l]; }  // rank on the left
  static constexpr int R(int l) { return MIRRORED ? RANK[core(l)] : RANK[l + 1]; }  // and on the right
  static constexpr int KP(int l) { return round_up(K(l)); }
  static constexpr int M(int l) {  // q_1 .. q_l
    int total = 1;
    for (int k = 0; k < l; k++) total *= Q(k);
    return total;
  }
  static constexpr int N(int l) { return l == LAST ? Q(l) : Q(l) * round_up(R(l)); }
  // Cores 0 .. l multiplied: [q_1 .. q_{l+1}, padded R], and D of all.
  static constexpr int PRODUCT(int l) { return M(l) * N(l); }
  static constexpr int WIDTH(int l) { return K(l) * Q(l) * R(l); }  // a slice as stored
  // Rows add up rows of the last core's slice, [K, q], where these divide into vectors; else they are products with its
  // columns, [q, padded K].
  static constexpr bool BY_ROWS = !MIRRORED && Q(LAST) % WIDEST == 0;
  // In the backward rows send their prefixes a gradient [M, padded K], where that is less than a slice of the last core
  // or slices lie by rows. Else prefixes read their rows' slices, and are the lowest level that sends.
  static constexpr bool ROWS_SEND = BY_ROWS || M(LAST) < Q(LAST);
  static constexpr int SENDER = ROWS_SEND ? LAST : LAST - 1;
  // Floats of the widest that is sent from there or above, or of the gradient that it is made of.
  static constexpr int SENT() {
    int most = ROWS_SEND ? PRODUCT(LAST) : PRODUCT(0);
    for (int l = 1; l <= SENDER; l++) most = std::max(most, M(l) * KP(l));
    return most;
  }
  // A slice as multiplied: [K, q, padded R], the last one as above.
  static constexpr int PACKED(int l) { return l == LAST ? Q(l) * (BY_ROWS ? K(l) : KP(l)) : K(l) * N(l); }
  static constexpr bool AS_STORED(int l) {
    if (l == LAST) return BY_ROWS || ((MIRRORED || Q(l) == 1) && K(l) % PAD == 0);
    return !MIRRORED && R(l) % PAD == 0;
  }
  static constexpr bool IN_PLACE(int l) { return AS_STORED(l) && stored_as(core(l)) == FLOAT32; }
  // The last core's slice is turned for whoever reads it where the compiler can move vectors: of a large table
  // most slices have one or two, and copies of all would take as much of the caches again.
  static constexpr bool TURNED(int l) {
    return l == LAST && !AS_STORED(l) && stored_as(core(l)) == FLOAT32 && Q(l) <= 16 && (Q(l) & (Q(l) - 1)) == 0;
  }
  static constexpr bool COPIED(int l) { return !IN_PLACE(l) && !TURNED(l); }
};
constexpr int D = Sizes<false>::M(ORDER);

// Columns of a mirrored row come in the order of its cores: entry j is where column j of that order belongs.
constexpr std::array<int, D> COLUMN = [] {
  std::array<int, D> to{};
  for (int j = 0; j < D; j++)
    for (int c = 0, rest = j, weight = D; c < ORDER; c++) {  // the last core read is core 0
      weight /= DIM[c];
      to[j] += rest % DIM[c] * weight;
      rest /= DIM[c];
    }
  return to;
}();

constexpr int WIDEST_SLICE = [] {
  int most = 0;
  for (int l = 0; l < ORDER; l++)
    most = std::max({most, Sizes<false>::PACKED(l), Sizes<true>::PACKED(l),
                     l ? Sizes<false>::N(l) * Sizes<false>::KP(l) : 0, l ? Sizes<true>::N(l) * Sizes<true>::KP(l) : 0});
  return most;
}();

// About what a core slice, one row of a product with it, and one row of the table cost in ids, each of which is copied
// to or added from its bag, or in gradients that a node is sent.
constexpr int64_t SLICE_COST = 96, PRODUCT_COST = 12, ROW_COST = 8;
// About what a core has of cache for itself, in bytes.
constexpr int64_t CACHE = 1 << 20;
// Nodes of a run up to which a slice is not worth transposing.
constexpr int64_t FEW = 3;
// Rows computed at once: about 16 kB of them.
constexpr int64_t ROWS_AT_ONCE = std::max<int64_t>(8, std::min<int64_t>(PIECE, 4096 / D));
// Nodes and slices ahead of which what they read is asked for, cache lines of a slice, ids of a row, and bags that it
// is written to.
constexpr int64_t NODES_AHEAD = 8, SLICES_AHEAD = 2, SLICE_LINES = 64, IDS_AHEAD = 4, BAGS_AHEAD = 12;

// Nodes of level l whose gradients are held at once: 16 kB of them, in whole chains of rows, and one chain at least.
template <class S>
constexpr int nodes_at_once(int l) {
  const int chain = (CHAIN + S::M(l) - 1) / S::M(l);
  return std::max(1, smaller(PIECE, 4096 / S::PRODUCT(l)) / chain) * chain;
}

template <class S>
constexpr int widest_gradients() {
  int most = S::PRODUCT(0);
  for (int l = 1; l < ORDER; l++) most = std::max(most, nodes_at_once<S>(l) * S::PRODUCT(l));
  return most;
}

// Per-thread room, off the stack: a slice of rank 256 is over a megabyte.
enum Room { TILE, SLICE, GRADIENTS, ROOMS };
constexpr int WIDEST_GRADIENTS = std::max(widest_gradients<Sizes<false>>(), widest_gradients<Sizes<true>>());
// Where each begins, in whole lines, and how much all take.
constexpr int64_t ROOM_AT[] = {0, (WIDEST_SLICE + LINE - 1) / LINE * LINE, 2 * ((WIDEST_SLICE + LINE - 1) / LINE * LINE)};
constexpr int64_t OWN = ROOM_AT[GRADIENTS] + (WIDEST_GRADIENTS + LINE - 1) / LINE * LINE;

float* scratch(const Call& call, Room which) {
  float* room = call.own + omp_get_thread_num() * call.own_stride + ROOM_AT[which];
  if (POISON) std::fill_n(room, which == GRADIENTS ? WIDEST_GRADIENTS : WIDEST_SLICE, NAN);
  return room;
}

// What a task leaves in its thread's room is not for the next one.
void forget(const Call& call) {
  for (int which = TILE; POISON && which < ROOMS; which++) scratch(call, static_cast<Room>(which));
}

template <bool MIRRORED>
struct Train : Sizes<MIRRORED> {
  using S = Sizes<MIRRORED>;
  const Table& table;
  const Call& call;
  float* packed[ORDER];
  float* products[ORDER];  // of levels 1 .. d - 2: of the table where it keeps them, else of this slice
  const bool keeps;
  float* rows;
  int64_t slice = 0;

  // `worker`: in whose workspace, where threads have one each.
  Train(const Table* t, const Call* c, int64_t worker = 0) : table(*t), call(*c), keeps(keeps_products(*t, *c)) {
    float *kept = table.kept, *spare = table.spare + worker * worker_size(table, call);
    for (int l = 0; l < ORDER; l++) packed[l] = kept, kept += packed_size(table, l);
    float*& at = keeps ? kept : spare;
    for (int l = 1; l < LAST; l++) products[l] = at, at += products_size(table, l, keeps);
    rows = keeps_rows(call) ? kept : table.spare + table.workers * worker_size(table, call);
  }

  static int64_t packed_size(const Table& table, int l) {
    return S::COPIED(l) ? table.level[l].touched * S::PACKED(l) : 0;
  }
  // For the backward: of one slice, and of several where all are at most 3/2 of what rows of its share send, or, where
  // rows send nothing, of their gradients.
  static bool keeps_products(const Table& table, const Call& call) {
    const int64_t room = table.share_rows * (S::ROWS_SEND ? S::SENT() : D);
    return table.slices == 1 || (call.keep && 2 * all_products_size(table, true) <= 3 * room);
  }
  static bool keeps_rows(const Call& call) { return call.bag && call.weights && call.keep; }
  static int64_t most_nodes(const Table& table, int l) {
    int64_t most = 0;
    for (int64_t s = 0; s < table.slices; s++)
      most = std::max<int64_t>(most, table.level[l].slice_node[s + 1] - table.level[l].slice_node[s]);
    return most;
  }
  static int64_t products_size(const Table& table, int l, bool whole) {  // of the table, or of its largest slice
    return (whole ? table.level[l].nodes : most_nodes(table, l)) * S::PRODUCT(l);
  }
  static int64_t all_products_size(const Table& table, bool whole) {
    int64_t total = 0;
    for (int l = 1; l < LAST; l++) total += products_size(table, l, whole);
    return total;
  }

  static int64_t kept_size(const Table& table, const Call& call) {
    int64_t total = 0;
    for (int l = 0; l < ORDER; l++) total += packed_size(table, l);
    if (keeps_products(table, call)) total += all_products_size(table, true);
    return total + (keeps_rows(call) ? table.rows() * D : 0);
  }
  // A worker's: products, and what nodes send.
  static int64_t worker_size(const Table& table, const Call& call) {
    int64_t total = keeps_products(table, call) ? 0 : all_products_size(table, false);
    if (call.grad_out)
      total += most_nodes(table, S::SENDER) * S::SENT() + (S::ROWS_SEND ? 0 : most_nodes(table, LAST) * D);
    return (total + LINE - 1) / LINE * LINE;
  }
  // Of the gradients of all slices of cores, of one part, and whether each has been begun.
  static int64_t tiles_size(const Table& table) {
    int64_t total = 0;
    for (int l = 1; l < ORDER; l++) total += table.level[l].touched * (S::PACKED(l) + 1);
    return table.slices > 1 ? (total + LINE - 1) / LINE * LINE : 0;
  }
  static int64_t spare_size(const Table& table, const Call& call) {
    const int64_t total = table.workers * worker_size(table, call);
    if (call.grad_out) return total + table.parts * tiles_size(table);
    return total + (call.bag && !keeps_rows(call) ? table.rows() * D : 0);
  }

  int64_t begin(int l) const { return table.level[l].slice_node[slice]; }
  int64_t end(int l) const { return table.level[l].slice_node[slice + 1]; }

  // Element (k, e, r) of a slice of core l is at this place of the stored slice.
  static constexpr int stored(int l, int k, int e, int r) {
    return MIRRORED ? (r * S::Q(l) + e) * S::K(l) + k : (k * S::Q(l) + e) * S::R(l) + r;
  }
  // Moves between a slice as stored and as multiplied. The last core's columns lie interleaved: one iteration moves all
  // of them, which compilers make shuffles of vectors.
  template <int l, class Move>
  static void each_element(Move move) {
    constexpr int K = S::K(l), Q = S::Q(l), R = S::R(l), RP = round_up(R), KP = S::KP(l);
    if constexpr (l == LAST) {
      for (int k = 0; k < K; k++)
#pragma GCC unroll 16
        for (int e = 0; e < Q; e++) move(e * KP + k, stored(l, k, e, 0));
    } else {
      for (int k = 0; k < K; k++)
        for (int e = 0; e < Q; e++)
          for (int r = 0; r < R; r++) move((k * Q + e) * RP + r, stored(l, k, e, r));
    }
  }
  template <int l>
  static void unpack(const float* __restrict slice, float* __restrict to) {
    each_element<l>([&](int p, int s) { to[p] = slice[s]; });
  }
  template <int l>
  static void repack(const float* __restrict from, float* __restrict slice) {
    each_element<l>([&](int p, int s) { slice[s] = from[p]; });
  }

  template <int l>
  void pack_touched() const {
    if constexpr (S::COPIED(l)) {
      const Level& level = table.level[l];
#pragma omp for schedule(static) nowait
      for (int64_t g = 0; g < level.touched; g++) {
        float* to = packed[l] + g * S::PACKED(l);
        float* room = S::AS_STORED(l) ? to : scratch(call, TILE);
        const float* slice = read_row<S::core(l), S::WIDTH(l)>(table.param[S::core(l)], level.digit[g], room);
        if (S::AS_STORED(l)) continue;
        if (S::PACKED(l) > S::WIDTH(l)) std::fill(to, to + S::PACKED(l), 0.0f);
        unpack<l>(slice, to);
      }
    }
    if constexpr (l < LAST) pack_touched<l + 1>();
  }

  // The slice of core l of a group of nodes (level 0: of a node), as stored.
  const float* slice_of(int l, int64_t group) const {
    return table.param[S::core(l)] + int64_t{table.level[l].digit[group]} * S::WIDTH(l);
  }
  // The same as multiplied.
  const float* matrix(int l, int64_t group) const {
    return S::IN_PLACE(l) ? slice_of(l, group) : packed[l] + group * S::PACKED(l);
  }
  // Room for that slice as multiplied; what pads it stays zero.
  struct Turned {
    alignas(64) float slice[S::TURNED(LAST) ? S::PACKED(LAST) : 1];
    Turned() {
      if (S::KP(LAST) > S::K(LAST)) std::fill(std::begin(slice), std::end(slice), 0.0f);
    }
  };
  const float* last_matrix(int64_t group, Turned& room) const {
    if constexpr (S::TURNED(LAST)) {
      unpack<LAST>(slice_of(LAST, group), room.slice);
      return room.slice;
    } else {
      return matrix(LAST, group);
    }
  }
  // The product of cores 0 .. l at a node: [M(l + 1), padded R].
  const float* product(int l, int64_t node) const {
    return l == 0 ? matrix(0, node) : products[l] + product_at(l, node);
  }
  int64_t product_at(int l, int64_t node) const {
    return (node - (keeps ? 0 : begin(l))) * S::PRODUCT(l);
  }

  // The products of levels l .. d - 2.
  template <int l>
  void multiply_level() const {
    if constexpr (l < LAST) {
      const Level& level = table.level[l];
      const int64_t first = begin(l), last = level.past_piece[slice];
      const auto cost = [&](int64_t p) { return PRODUCT_COST * S::M(l) * level.piece_start[p] + SLICE_COST * p; };
      share_tasks(first, last, cost, [&](int64_t p) {
        const float* a[PIECE * S::M(l)];
        float* c[PIECE * S::M(l)];
        const int64_t from = level.piece_start[p];
        int64_t rows = 0;
        for (int64_t k = from; k < level.piece_start[p + 1]; k++) {
          const int64_t node = level.by_digit[k];
          const float* above = product(l - 1, level.parent[node]);
          float* own = products[l] + product_at(l, node);
          prefetch_row(above, S::PRODUCT(l - 1));
          prefetch_row<true>(own, S::PRODUCT(l));
          for (int m = 0; m < S::M(l); m++, rows++) a[rows] = above + m * S::KP(l), c[rows] = own + m * S::N(l);
        }
        multiply_rows<S::K(l), S::N(l), false>(rows, a, matrix(l, level.group[level.by_digit[from]]), c);
      });
#pragma omp barrier
      multiply_level<l + 1>();
    }
  }

  // What the runs of level l before this one cost, without what lies below their nodes.
  template <int l>
  int64_t cost_of_runs(int64_t run) const {
    const int64_t of_node = l == LAST ? ROW_COST : PRODUCT_COST * S::M(l);
    return of_node * table.level[l].run_start[run] + SLICE_COST * run;
  }

  // What a slice of the table costs in the forward.
  int64_t cost_of_slice(int64_t of) const {
    const Level& last = table.level[LAST];
    int64_t cost = last.first[last.slice_node[of + 1]] - last.first[last.slice_node[of]];
    for (int l = 1; l < ORDER; l++) {
      const int64_t nodes = table.level[l].slice_node[of + 1] - table.level[l].slice_node[of];
      cost += nodes * (l == LAST ? ROW_COST : PRODUCT_COST * S::M(l));
    }
    return cost;
  }

  // Rows that share a slice of the last core, each [D], the products above them given.
  static void multiply_last(int64_t n, const float* const* above, const float* slice, float* const* to) {
    constexpr int M = S::M(LAST), KP = S::KP(LAST), Q = S::Q(LAST);
    if constexpr (S::BY_ROWS) {
      const float* a[ROWS_AT_ONCE * M];
      float* c[ROWS_AT_ONCE * M];
      for (int64_t i = 0; i < n; i++)
        for (int m = 0; m < M; m++) a[i * M + m] = above[i] + m * KP, c[i * M + m] = to[i] + m * Q;
      multiply_rows<S::K(LAST), Q, false>(n * M, a, slice, c);
    } else {
      for (int64_t i = 0; i < n; i++) {
        float raw[D];
        dot_rows<M, KP, Q>(above[i], slice, MIRRORED ? raw : to[i]);
        if constexpr (MIRRORED)
          for (int j = 0; j < D; j++) to[i][COLUMN[j]] = raw[j];
      }
    }
  }

  // Computes the rows of this slice, those that share a slice of the last core together: each at where(u) or, for null,
  // in memory that it shares with others, and calls act(u, row).
  template <class Where, class Act>
  void each_row(Where where, Act act) const {
    const Level& last = table.level[LAST];
    const int64_t first = begin(LAST), past = last.past_run[slice];
    Turned turned;
    const auto cost = [&](int64_t run) { return cost_of_runs<LAST>(run) + last.run_below[run]; };
    share_tasks(first, past, cost, [&](int64_t run) {
      const Where place = where;  // as in share_tasks
      const Act use = act;
      const float* matrix = last_matrix(last.run_group[run], turned);
      for (int64_t from = last.run_start[run]; from < last.run_start[run + 1]; from += ROWS_AT_ONCE) {
        const int32_t* u = last.by_digit + from;
        const int64_t n = std::min<int64_t>(ROWS_AT_ONCE, last.run_start[run + 1] - from);
        const float* above[ROWS_AT_ONCE];
        float *to[ROWS_AT_ONCE], room[ROWS_AT_ONCE * D];
        for (int64_t i = 0; i < n; i++) {
          above[i] = product(LAST - 1, last.parent[u[i]]), to[i] = place(u[i]);
          prefetch_row(above[i], S::PRODUCT(LAST - 1));
          if (to[i])
            prefetch_row<true>(to[i], D);
          else
            to[i] = room + i * D;
        }
        multiply_last(n, above, matrix, to);
        for (int64_t i = 0; i < n; i++) use(u[i], to[i]);
      }
    });
  }

  void forward_rows() const {
    const int32_t *const first = table.level[LAST].first, *const perm = table.perm;
    float* const list = call.bag ? rows : nullptr;
    int32_t* const slot = call.slot;
    const float* const weights = call.weights;
    const Places place(&table, &call);
    const auto where = [=](int64_t u) -> float* {
      if (list) return list + u * D;
      if (weights) return nullptr;
      // Straight to where its first id belongs.
      const int64_t k = first[u], some = std::min<int64_t>(k + BAGS_AHEAD, first[u + 1]);
      for (int64_t other = k + 1; other < some; other++) prefetch_row<true>(place(perm[other]), D);
      return place(perm[k]);
    };
    each_row(where, [=](int64_t u, const float* row) {
      const int64_t past = first[u + 1];
      int64_t k = first[u];
      if (list) {
        for (; k < past; k++) slot[perm[k]] = static_cast<int32_t>(u);
        return;
      }
      for (k += !weights; k < past; k++) {
        if (k + BAGS_AHEAD < past) prefetch_row<true>(place(perm[k + BAGS_AHEAD]), D);
        float* const out = place(perm[k]);
        if (weights)
          for (int j = 0; j < D; j++) out[j] = weights[perm[k]] * row[j];
        else
          std::copy(row, row + D, out);
      }
    });
#pragma omp barrier
  }

  void forward() {
    pack_touched<0>();
#pragma omp barrier
    const auto cost = [&](int64_t of) { return cost_of_slice(of); };
    each_alone(table, call, table.slices, cost, [&](const Call* own, int64_t worker, int64_t of) {
      Train train(&table, own, worker);
      train.slice = of;
      train.template multiply_level<1>();
      train.forward_rows();
    });
    if (!call.bag) return;
    each_feature(&table, &call, [&](int64_t f, int64_t first, int64_t last) {
      const int64_t *const offsets = call.offsets + f * call.batch, past = offsets[last];
      const int32_t* const slot = call.slot;
      const float *const list = rows, *const weights = call.weights;
      for (int64_t b = first; b < last; b++) {
        if (adds_nothing(&call, f, b)) continue;
        const float share = share_of(&call, f, b);
        float sum[D] = {};
        for (int64_t i = offsets[b], end = offsets[b + 1]; i < end; i++) {
          if (i + AHEAD<D> < past) prefetch_row(list + int64_t{slot[i + AHEAD<D>]} * D, D);
          const float w = weights ? weights[i] * share : share;
          const float* row = list + int64_t{slot[i]} * D;
          for (int j = 0; j < D; j++) sum[j] += w * row[j];
        }
        put_bag<D>(&call, f, b, sum);
      }
    });
  }
};

}  // namespace
}  // namespace recemb
