// Tables that read blocks of one shared array at hashed places: -DDIM, -DBLOCK (Z), -DSIGNED=0 or 1. The
// tables of a group are one table of the driver, told apart by their keys.
//
// A block of Z weights starts anywhere, so it overlaps at most two rows of the array [rows, Z]. Every thread has a run
// of the array's rows, and sorts the blocks that start there; each row gathers its gradient from the blocks that start
// in it or in the row before: one owner, one order, and the optimizer steps on it at once.
#include <algorithm>

#include "recemb_bags.h"
#include "recemb_sort.h"
#include "recemb_storage.h"
#include "recemb_tree.h"

using namespace recemb;

namespace {

constexpr int D = DIM, Z = BLOCK, BLOCKS = (D + Z - 1) / Z;
// A row of one block is hashed as cheaply as it is made distinct: its gradients go to the array one by one. A row of
// several blocks is made distinct first (the driver's plan), its gradient summed and then split.
constexpr bool DIRECT = BLOCKS == 1;
constexpr uint64_t P = (uint64_t{1} << 61) - 1;

uint64_t multiply(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  const uint64_t folded = static_cast<uint64_t>(product & P) + static_cast<uint64_t>(product >> 61);
  return folded >= P ? folded - P : folded;
}
uint64_t add(uint64_t a, uint64_t b) { return a + b >= P ? a + b - P : a + b; }

// x mod m without a division: m's reciprocal in 64 bits is at most one off for x < 2^61.
struct Modulus {
  uint64_t m, reciprocal;
  explicit Modulus(uint64_t modulus) : m(modulus), reciprocal(~uint64_t{0} / modulus) {}
  uint64_t of(uint64_t x) const {
    const uint64_t q = static_cast<uint64_t>(static_cast<unsigned __int128>(x) * reciprocal >> 64), rest = x - q * m;
    return rest >= m ? rest - m : rest;
  }
};

// constants: rows, tables, slot B, slot Q, sign B, sign Q, key base per table, then per table BLOCKS slot and
// BLOCKS sign offsets A e + C b + D.
struct Hash {
  const int64_t* c;
  const Modulus size;
  explicit Hash(const Table* table) : c(table->code->constants), size(static_cast<uint64_t>(c[0]) * Z) {}
  int64_t table_of(int64_t key) const {
    return c[1] == 1 ? 0 : std::upper_bound(c + 6, c + 6 + c[1], key) - (c + 6) - 1;
  }

  // start[b] in [0, |M|) and sign[b] of every block of a row of table t
  void place(int64_t t, int64_t key, int64_t* start, float* sign) const {
    const uint64_t x = static_cast<uint64_t>(key - c[6 + t]);
    const int64_t* offset = c + 6 + c[1] + t * 2 * BLOCKS;
    const uint64_t slot = multiply(add(multiply(c[3], x), c[2]), x);
    for (int b = 0; b < BLOCKS; b++) start[b] = static_cast<int64_t>(size.of(add(slot, offset[b])));
    if constexpr (SIGNED) {
      const uint64_t hashed = multiply(add(multiply(c[5], x), c[4]), x);
      for (int b = 0; b < BLOCKS; b++) sign[b] = add(hashed, offset[BLOCKS + b]) & 1 ? -1.0f : 1.0f;
    } else {
      std::fill(sign, sign + BLOCKS, 1.0f);
    }
  }
};

constexpr int length_of(int b) { return b + 1 < BLOCKS ? Z : D - b * Z; }

// sum[length] += factor * the weights from `start` on: the end of one array row, as stored, and the begin of the next.
void add_stored_block(const Table* table, int64_t start, int length, float factor, float* sum) {
  float room[2 * Z];
  const int64_t row = start / Z, count = table->code->constants[0];
  const int first = static_cast<int>(start % Z), here = std::min(length, Z - first);
  const float* from = read_row<0, Z>(table->param[0], row, room) + first;
  for (int j = 0; j < here; j++) sum[j] += factor * from[j];
  if (here == length) return;
  from = read_row<0, Z>(table->param[0], row + 1 == count ? 0 : row + 1, room + Z);
  for (int j = here; j < length; j++) sum[j] += factor * from[j - here];
}

// sum[D] += w * row
void add_row(const Table* table, const Hash& hash, int64_t t, int64_t key, float w, float* sum) {
  int64_t start[BLOCKS];
  float sign[BLOCKS];
  hash.place(t, key, start, sign);
  for (int b = 0; b < BLOCKS; b++) {
    if constexpr (!TRAINS) {
      add_stored_block(table, start[b], length_of(b), w * sign[b], sum + b * Z);
      continue;
    }
    const int64_t here = std::min<int64_t>(length_of(b), static_cast<int64_t>(hash.size.m) - start[b]);
    const float* from = table->param[0] + start[b];
    const float factor = w * sign[b];
    if (here == length_of(b)) {
      for (int j = 0; j < length_of(b); j++) sum[b * Z + j] += factor * from[j];
    } else {
      for (int64_t j = 0; j < here; j++) sum[b * Z + j] += factor * from[j];
      for (int64_t j = here; j < length_of(b); j++) sum[b * Z + j] += factor * table->param[0][j - here];
    }
  }
}

// The blocks of the batch. They lie in the table's workspace, behind the distinct rows' gradients where there are any.
struct Blocks {
  int64_t n;
  int64_t *start, *piece;          // [n] in order of piece: (position in the batch, or distinct row) * BLOCKS + block
  int64_t *sorted, *sorted_piece;  // [n] by start
  int64_t* count;                  // [threads] that start in a thread's array rows
  void* records;                   // [2 n]
  float* sign;                     // [n] by piece
  int64_t floats;                  // of all

  Blocks(const Table* table, const Call* call) : n(DIRECT ? table->ids : table->rows() * BLOCKS) {
    const int64_t threads = omp_get_num_threads();
    const int64_t gradients = DIRECT ? 0 : (table->rows() * D + LINE - 1) / LINE * LINE;
    const int64_t record = is_wide(table) ? sizeof(Wide) : sizeof(Narrow);
    constexpr int64_t PAGE = 4096 / sizeof(int64_t);
    int64_t* const base = reinterpret_cast<int64_t*>(table->spare + gradients);
    // Each at another place of its page: a processor takes a load for one of what a store has just written when both
    // end in the same twelve bits, and waits.
    int64_t at = 0, arrays = 0;
    const auto take = [&](int64_t count) {
      at = (at + PAGE - 1) / PAGE * PAGE + arrays++ * (PAGE / 8);
      return at += count, base + at - count;
    };
    count = take(threads), start = take(n), piece = take(DIRECT ? n : 0), sorted = take(n), sorted_piece = take(n);
    records = take(2 * n * record / static_cast<int64_t>(sizeof(int64_t)));
    const int64_t signs = DIRECT ? call->num_ids : n;
    sign = reinterpret_cast<float*>(take((signs + 1) / 2));
    floats = sign - table->spare + signs;
  }
  static int64_t size_of(const Table* table) { return table->code->constants[0] * Z; }
  static bool is_wide(const Table* table) { return size_of(table) >> 32; }
};

// The array rows of this thread, and the blocks that start in them, by start.
struct Share {
  int64_t first, past;  // rows
  int64_t begin, end;   // of `sorted`
};

// Sorts this thread's share of the blocks. Each thread reads the starts of all of them, twice: that takes a tenth of
// what it takes one of them to sort all.
template <class Record>
void sort_pieces(Blocks& blocks, const Share& share) {
  const int64_t own = share.end - share.begin, low = share.first * Z;
  const uint64_t width = static_cast<uint64_t>(share.past - share.first) * Z;
  Record* const records = static_cast<Record*>(blocks.records) + 2 * share.begin;
  // Of a start below the share's the key wraps, to one that no share has.
  const auto block = [&](int64_t i) { return Record(static_cast<uint64_t>(blocks.start[i] - low), i); };
  select_keys(block, 0, blocks.n, 0, width, records);
  const auto read = [records](int64_t i) { return records[i]; };
  const Record* sorted = radix_sort(read, records + own, records, own, bits_of(width - 1));
  for (int64_t k = 0; k < own; k++) {
    blocks.sorted[share.begin + k] = static_cast<int64_t>(sorted[k].key()) + low;
    blocks.sorted_piece[share.begin + k] = DIRECT ? blocks.piece[sorted[k].value()] : sorted[k].value();
  }
}

// Cuts the array's rows among the threads of the region, and sorts the blocks; every thread calls it.
Share sort_blocks(const Table* table, Blocks& blocks) {
  const int64_t rows = table->code->constants[0], thread = omp_get_thread_num(), threads = omp_get_num_threads();
  Share share{rows * thread / threads, rows * (thread + 1) / threads, 0, 0};
  const int64_t low = share.first * Z;
  const uint64_t width = static_cast<uint64_t>(share.past - share.first) * Z;
  int64_t own = 0;
  for (int64_t i = 0; i < blocks.n; i++) own += static_cast<uint64_t>(blocks.start[i] - low) < width;
  blocks.count[thread] = own;
#pragma omp barrier
  for (int64_t t = 0; t < thread; t++) share.begin += blocks.count[t];
  share.end = share.begin + own;
  if (own && Blocks::is_wide(table))
    sort_pieces<Wide>(blocks, share);
  else if (own)
    sort_pieces<Narrow>(blocks, share);
#pragma omp barrier
  return share;
}

// sum[2 Z] of the blocks from `at` on that start in array row `from`: that row and the one after it. Whole blocks
// are added, so that the loops have constant lengths; a row takes its half of two such sums. Moves `at` behind them,
// and returns whether one goes on in the row after.
bool add_blocks(const Table* table, const Call* call, const Blocks& blocks, int64_t* at, int64_t from, float* sum) {
  const int64_t n = blocks.n, end = (from + 1) * Z;
  bool goes_on = false;
  std::fill(sum, sum + 2 * Z, 0.0f);
  int64_t k = *at;
  for (; k < n && blocks.sorted[k] < end; k++) {
    if (DIRECT && k + AHEAD < n) {
      const int64_t next = blocks.sorted_piece[k + AHEAD];
      prefetch_row(sender_of(table, call, next).grad, Z), __builtin_prefetch(&blocks.sign[next]);
    }
    const int64_t piece = blocks.sorted_piece[k];
    const int b = static_cast<int>(piece % BLOCKS);
    const Sender sender = DIRECT ? sender_of(table, call, piece) : Sender{table->spare + piece / BLOCKS * D + b * Z, 1};
    const float* g = sender.grad;
    const float factor = blocks.sign[piece] * sender.weight;
    float* to = sum + (blocks.sorted[k] - from * Z);
    goes_on = goes_on || blocks.sorted[k] + length_of(b) > end;
    if (b + 1 < BLOCKS)
      for (int j = 0; j < Z; j++) to[j] += factor * g[j];
    else
      for (int j = 0; j < length_of(BLOCKS - 1); j++) to[j] += factor * g[j];
  }
  *at = k;
  return goes_on;
}

// Steps on the touched rows of this thread's share. A row's gradient is its half of the blocks that start in it and the
// other half of those that start in the row before, which the loop has just added up and hands on.
void add_rows(const Table* table, const Call* call, const Blocks& blocks, const Share& share) {
  if (share.first == share.past) return;
  float sums[2][2 * Z], grad[Z];
  float *own = sums[0], *spilled = sums[1];
  // Before row 0 is the last one.
  const int64_t before = (share.first ? share.first : table->code->constants[0]) - 1;
  int64_t tail = share.first ? share.begin : blocks.n;
  while (tail > 0 && blocks.sorted[tail - 1] >= before * Z) tail--;
  bool goes_on = add_blocks(table, call, blocks, &tail, before, spilled);
  for (int64_t at = share.begin, row = share.first - 1;; std::swap(own, spilled)) {
    row = goes_on ? row + 1 : at < share.end ? blocks.sorted[at] / Z : share.past;
    if (row >= share.past) return;
    if (!goes_on) std::fill(spilled, spilled + 2 * Z, 0.0f);
    goes_on = add_blocks(table, call, blocks, &at, row, own);
    for (int j = 0; j < Z; j++) grad[j] = own[j] + spilled[Z + j];
    finish_row<Z>(table, 0, row, grad);
  }
}

int64_t kept(const Table*, const Call*) { return 0; }
int64_t spare(const Table* table, const Call* call) { return call->grad_out ? Blocks(table, call).floats : 0; }

void forward(const Table* table, const Call* call) {
  const Hash hash(table);
  each_feature(table, call, [&](int64_t f, int64_t begin, int64_t end) {
    const int64_t t = hash.table_of(call->features[f].key_base);
    pool_bags<D, D>(
        call, f, begin, end, [](int64_t) {},
        [&](int64_t key, float w, float* sum) { add_row(table, hash, t, key, w, sum); },
        [&](int64_t b, const float* sum) {
          if (!adds_nothing(call, f, b)) put_bag<D>(call, f, b, sum);
        });
  });
}

void backward(const Table* table, const Call* call) {
  const Hash hash(table);
  if (call->grad_weights) {
    each_feature(table, call, [&](int64_t f, int64_t begin, int64_t end) {
      const int64_t base = call->features[f].key_base, t = hash.table_of(base);
      weight_gradients(call, f, begin, end, [&](int64_t i, const float* grad) {
        float row[D] = {}, dot = 0;
        add_row(table, hash, t, call->ids[i] + base, 1.0f, row);
#pragma omp simd reduction(+ : dot)
        for (int j = 0; j < D; j++) dot += row[j] * grad[j];
        return dot;
      });
    });
  }
  Blocks blocks(table, call);
  if (!blocks.n) return;  // the workspace of a batch of no samples is empty
  if constexpr (DIRECT) {
    int64_t before = 0;
    for (int64_t k = 0; k < table->num_features; k++) {
      const int64_t f = table->features[k], base = call->features[f].key_base, t = hash.table_of(base);
      const int64_t begin = call->offsets[f * call->batch], end = call->offsets[(f + 1) * call->batch];
#pragma omp for schedule(static) nowait
      for (int64_t i = begin; i < end; i++) {
        hash.place(t, call->ids[i] + base, &blocks.start[before + i - begin], &blocks.sign[i]);
        blocks.piece[before + i - begin] = i;
      }
      before += end - begin;
    }
#pragma omp barrier
  } else {
    share_rows(table, [&](int64_t u) {
      hash.place(hash.table_of(table->keys[u]), table->keys[u], &blocks.start[u * BLOCKS], &blocks.sign[u * BLOCKS]);
      row_gradient<D>(table, call, u, table->spare + u * D);
    });
#pragma omp barrier
  }
  const Share share = sort_blocks(table, blocks);
  add_rows(table, call, blocks, share);
}

}  // namespace

extern "C" Functions recemb_kernel = {kept, spare, forward, TRAINS ? backward : nullptr};
