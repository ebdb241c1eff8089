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
// Starts of more bits do not fit a narrow record. Tests have no memory for such an array.
#ifndef WIDE_BITS
#define WIDE_BITS 32
#endif

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

constexpr int64_t MOST_READ = int64_t{1} << 22;  // bytes of an array that is read in its order

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

// The blocks of the batch, as records: where one starts in the array, and what it is a part of, a position in the batch
// or, of rows of several blocks, distinct row * BLOCKS + block, whose highest bit is the sign. They lie in the table's
// workspace, behind the distinct rows' gradients where there are any.
template <class Record>
struct Blocks {
  // The array rows of one thread, and the blocks that start in them, by start, which is counted from the first row.
  struct Share {
    int64_t first, past;  // rows
    int64_t count;        // blocks
    const Record* sorted;
    char apart[LINE * sizeof(float)];  // from what other threads write
  };

  int64_t n;
  Share* shares;    // [threads]
  Record* placed;   // [n] by piece
  Record* room[2];  // [n] each
  int64_t floats;   // of all

  explicit Blocks(const Table* table) : n(DIRECT ? table->ids : table->rows() * BLOCKS) {
    constexpr int64_t PAGE = 4096;
    const int64_t gradients = DIRECT ? 0 : (table->rows() * D + LINE - 1) / LINE * LINE;
    char* const base = reinterpret_cast<char*>(table->spare + gradients);
    // Each at another place of its page: a processor takes a load for one of what a store has just written when both
    // end in the same twelve bits, and waits.
    int64_t at = 0, arrays = 0;
    const auto take = [&](int64_t bytes) {
      at = (at + PAGE - 1) / PAGE * PAGE + arrays++ * (PAGE / 8);
      return at += bytes, base + at - bytes;
    };
    const int64_t all = n * static_cast<int64_t>(sizeof(Record));
    shares = reinterpret_cast<Share*>(take(omp_get_num_threads() * static_cast<int64_t>(sizeof(Share))));
    for (Record** array : {&placed, &room[0], &room[1]}) *array = reinterpret_cast<Record*>(take(all));
    floats = gradients + (at + 3) / 4;
  }

  static Record placed_at(int64_t start, int64_t piece, float sign) {
    return Record(static_cast<uint64_t>(start), piece | (sign < 0) * SIGN);
  }
  static int64_t piece_of(Record record) { return record.value() & (SIGN - 1); }
  static float sign_of(Record record) { return SIGNED && record.value() < 0 ? -1.0f : 1.0f; }
  static constexpr int64_t SIGN = int64_t{1} << 31;
};

bool is_wide(const Table* table) { return table->code->constants[0] * Z >> WIDE_BITS; }

// Cuts the array's rows among the threads of the region, and sorts the blocks; every thread calls it. Each reads the
// starts of all of them, twice: that takes a tenth of what it takes one of them to sort all.
template <class Record>
void sort_blocks(const Table* table, const Blocks<Record>& blocks) {
  const int64_t rows = table->code->constants[0], thread = omp_get_thread_num(), threads = omp_get_num_threads();
  auto& share = blocks.shares[thread];
  share.first = rows * thread / threads, share.past = rows * (thread + 1) / threads;
  const uint64_t low = static_cast<uint64_t>(share.first) * Z;
  const uint64_t width = static_cast<uint64_t>(share.past - share.first) * Z;
  // Of a start below the share's the key wraps, to one that no share has.
  const auto block = [&](int64_t i) { return Record(blocks.placed[i].key() - low, blocks.placed[i].value()); };
  int64_t own = 0, before = 0;
  for (int64_t i = 0; i < blocks.n; i++) own += blocks.placed[i].key() - low < width;
  share.count = own;
#pragma omp barrier
  for (int64_t t = 0; t < thread; t++) before += blocks.shares[t].count;
  Record *const chosen = blocks.room[0] + before, *const other = blocks.room[1] + before;
  select_keys(block, 0, blocks.n, 0, width, chosen);
  share.sorted = radix_sort([=](int64_t i) { return chosen[i]; }, other, chosen, own, bits_of(width - 1));
#pragma omp barrier
}

// Steps on the touched rows of this thread's share. A row's gradient is its half of the blocks that start in the row
// before and of those that start in it, in this order. Rows are added up some at a time and stepped on afterwards: a
// processor waits for what it has just stored when it loads it again from a little beside.
template <class Record>
void add_rows(const Table* table, const Call* call, const Blocks<Record>& blocks) {
  constexpr int64_t AT_ONCE = std::max<int64_t>(2, 2048 / Z);
  const auto* const share = blocks.shares + omp_get_thread_num();
  if (share->first == share->past) return;
  const Senders from(table, call);
  // A slot is a row that is touched; the row after the last slot's has the next one, where a block goes on in it.
  alignas(64) float sums[(AT_ONCE + 3) * Z] = {};
  int64_t rows[AT_ONCE + 3], slot = 0;
  rows[0] = -1;
  bool goes_on = false;
  const auto finish = [&](int64_t slots) {
    // Rows rise from slot to slot: before the share's and beyond there may be others'.
    const int64_t begin = std::lower_bound(rows, rows + slots, share->first) - rows;
    const int64_t end = std::lower_bound(rows, rows + slots, share->past) - rows;
    finish_rows<Z>(table, 0, rows + begin, end - begin, sums + begin * Z);
  };
  // Blocks [begin, end) of `sorted`, whose starts count from row `first`.
  const auto add = [&](const Record* sorted, int64_t begin, int64_t end, int64_t first) {
    for (int64_t k = begin; k < end; k++) {
      if (slot >= AT_ONCE) {
        finish(slot);
        std::copy(sums + slot * Z, sums + (slot + 2) * Z, sums);
        std::fill(sums + 2 * Z, sums + (slot + 2) * Z, 0.0f);
        rows[0] = rows[slot], rows[1] = rows[slot + 1], slot = 0;
      }
      if (DIRECT && k + AHEAD<Z> < end)
        prefetch_row(from(Blocks<Record>::piece_of(sorted[k + AHEAD<Z>])).grad, Z);
      const int64_t start = static_cast<int64_t>(sorted[k].key()), row = first + start / Z, at = start % Z;
      const int64_t piece = Blocks<Record>::piece_of(sorted[k]);
      const int b = static_cast<int>(piece % BLOCKS);
      const Sender sender =
          DIRECT ? from(piece) : Sender{table->spare + piece / BLOCKS * D + b * Z, 1};
      const float* g = sender.grad;
      const float factor = Blocks<Record>::sign_of(sorted[k]) * sender.weight;
      const int64_t further = row - rows[slot];
      slot += std::min<int64_t>(further, 1 + goes_on);
      goes_on = (goes_on && !further) || at + length_of(b) > Z;
      rows[slot] = row, rows[slot + 1] = row + 1;
      prefetch_row<true>(table->param[0] + std::max(row, share->first) * Z, Z);
      float* to = sums + slot * Z + at;
      if (b + 1 < BLOCKS)
        for (int j = 0; j < Z; j++) to[j] += factor * g[j];
      else
        for (int j = 0; j < length_of(BLOCKS - 1); j++) to[j] += factor * g[j];
    }
  };
  // Before row 0 is the last one.
  const auto* before = share;
  do
    before = before == blocks.shares ? before + omp_get_num_threads() - 1 : before - 1;
  while (before->first == before->past);
  const int64_t last = (before->past - before->first - 1) * Z;
  int64_t tail = before->count;
  while (tail > 0 && static_cast<int64_t>(before->sorted[tail - 1].key()) >= last) tail--;
  add(before->sorted, tail, before->count, share->first - 1 - last / Z);
  add(share->sorted, 0, share->count, share->first);
  finish(slot + 1 + goes_on);
}

int64_t kept(const Table*, const Call*) { return 0; }
int64_t spare(const Table* table, const Call* call) {
  if (!call->grad_out) return 0;
  return is_wide(table) ? Blocks<Wide>(table).floats : Blocks<Narrow>(table).floats;
}

// Reads the array in its order before a batch reads much of it at random: from memory, that takes a tenth of the time.
void read_array(const Table* table) {
  constexpr int64_t BYTES = LINE * sizeof(float), LINES_OF_ROW = BLOCKS + D * row_bytes(0, Z) / (Z * BYTES);
  const int64_t lines = table->code->constants[0] * row_bytes(0, Z) / BYTES;
  if (lines * BYTES > MOST_READ || table->ids / omp_get_num_threads() * LINES_OF_ROW * 3 < lines) return;
  const uint8_t* at = stored_row(table->param[0], 0, Z, 0);
  unsigned sum = 0;
  for (int64_t line = 0; line < lines; line++) sum += at[line * BYTES];
  asm volatile("" : : "r"(sum));  // else nobody reads
}

void forward(const Table* table, const Call* call) {
  const Hash hash(table);
  read_array(table);
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

void backward_weights(const Table* table, const Call* call, const Hash& hash) {
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

template <class Record>
void backward_array(const Table* table, const Call* call, const Hash& hash) {
  const Blocks<Record> blocks(table);
  if (!blocks.n) return;  // the workspace of a batch of no samples is empty
  if constexpr (DIRECT) {
    int64_t before = 0;
    for (int64_t k = 0; k < table->num_features; k++) {
      const int64_t f = table->features[k], base = call->features[f].key_base, t = hash.table_of(base);
      const int64_t begin = call->offsets[f * call->batch], end = call->offsets[(f + 1) * call->batch];
#pragma omp for schedule(static) nowait
      for (int64_t i = begin; i < end; i++) {
        int64_t start;
        float sign;
        hash.place(t, call->ids[i] + base, &start, &sign);
        blocks.placed[before + i - begin] = Blocks<Record>::placed_at(start, i, sign);
      }
      before += end - begin;
    }
  } else {
    const Senders from(table, call);
    share_rows(table, [&](int64_t u) {
      int64_t start[BLOCKS];
      float sign[BLOCKS];
      hash.place(hash.table_of(table->keys[u]), table->keys[u], start, sign);
      for (int b = 0; b < BLOCKS; b++)
        blocks.placed[u * BLOCKS + b] = Blocks<Record>::placed_at(start[b], u * BLOCKS + b, sign[b]);
      row_gradient<D>(from, u, table->spare + u * D);
    });
  }
#pragma omp barrier
  sort_blocks(table, blocks);
  add_rows(table, call, blocks);
}

void backward(const Table* table, const Call* call) {
  const Hash hash(table);
  if (call->grad_weights) backward_weights(table, call, hash);
  if (is_wide(table))
    backward_array<Wide>(table, call, hash);
  else
    backward_array<Narrow>(table, call, hash);
}

}  // namespace

extern "C" Functions recemb_kernel = {kept, spare, forward, TRAINS ? backward : nullptr};
