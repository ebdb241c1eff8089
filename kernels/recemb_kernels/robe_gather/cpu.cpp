// Tables that read blocks of one shared array at hashed places: -DDIM, -DBLOCK (Z), -DSIGNED=0 or 1. The
// tables of a group are one table of the driver, told apart by their keys.
//
// A block of Z weights starts anywhere, so it overlaps at most two rows of the array [rows, Z]. Blocks are sorted
// by start, and each array row gathers its gradient from the blocks that start in it or in the row before: one
// owner, one order, and the optimizer steps on it at once.
#include <algorithm>
#include <vector>

#include "recemb_optim.h"
#include "recemb_sort.h"
#include "recemb_tree.h"

using namespace recemb;

namespace {

constexpr int D = DIM, Z = BLOCK, BLOCKS = (D + Z - 1) / Z;
constexpr uint64_t P = (uint64_t{1} << 61) - 1;

uint64_t multiply(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  const uint64_t folded = static_cast<uint64_t>(product & P) + static_cast<uint64_t>(product >> 61);
  return folded >= P ? folded - P : folded;
}
uint64_t add(uint64_t a, uint64_t b) { return a + b >= P ? a + b - P : a + b; }

// constants: rows, tables, slot B, slot Q, sign B, sign Q, key base per table, then per table BLOCKS slot and
// BLOCKS sign offsets A e + C b + D.
struct Hash {
  const int64_t* c;
  explicit Hash(const Table& table) : c(table.constants) {}
  int64_t size() const { return c[0] * Z; }
  int64_t table_of(int64_t key) const { return std::upper_bound(c + 6, c + 6 + c[1], key) - (c + 6) - 1; }

  // start[b] in [0, |M|) and sign[b] of every block of a row
  void place(int64_t key, int64_t* start, float* sign) const {
    const int64_t t = table_of(key);
    const uint64_t x = static_cast<uint64_t>(key - c[6 + t]);
    const int64_t* offset = c + 6 + c[1] + t * 2 * BLOCKS;
    const uint64_t slot = multiply(add(multiply(c[3], x), c[2]), x);
    for (int b = 0; b < BLOCKS; b++) start[b] = static_cast<int64_t>(add(slot, offset[b]) % size());
    if constexpr (SIGNED) {
      const uint64_t hashed = multiply(add(multiply(c[5], x), c[4]), x);
      for (int b = 0; b < BLOCKS; b++) sign[b] = add(hashed, offset[BLOCKS + b]) & 1 ? -1.0f : 1.0f;
    } else {
      std::fill(sign, sign + BLOCKS, 1.0f);
    }
  }
};

constexpr int length_of(int b) { return b + 1 < BLOCKS ? Z : D - b * Z; }

void accumulate(float* grad, const float* from, float sign, int64_t n) {
  for (int64_t j = 0; j < n; j++) grad[j] += sign * from[j];
}

void finish(const Table& table, const Call& call, int64_t row, const float* grad) {
  if (call.optimizer == GRADIENT) {
    std::copy(grad, grad + Z, table.grad[0] + row * Z);
    return;
  }
  const Hyper h{call.lr, call.eps, call.beta1, call.beta2, call.step};
  const int64_t width = call.optimizer == ROWWISE_ADAGRAD ? 1 : Z;
  update_row(call.optimizer, h, Z, table.param[0] + row * Z, grad,
             table.state[0] ? table.state[0] + row * width : nullptr,
             table.state2[0] ? table.state2[0] + row * width : nullptr);
}

// Sorted blocks of the batch, and the array rows that they touch.
struct Blocks {
  std::vector<int64_t> start;
  std::vector<int32_t> piece;  // distinct row * BLOCKS + block
  std::vector<float> sign;     // by piece
  std::vector<int64_t> row;    // touched array rows, rising
};

Blocks sort_blocks(const Table& table) {
  const Hash hash(table);
  const int64_t rows = table.level[0].nodes;
  Blocks blocks;
  blocks.start.resize(rows * BLOCKS), blocks.piece.resize(rows * BLOCKS), blocks.sign.resize(rows * BLOCKS);
  for (int64_t u = 0; u < rows; u++) {
    hash.place(table.keys[u], &blocks.start[u * BLOCKS], &blocks.sign[u * BLOCKS]);
    for (int b = 0; b < BLOCKS; b++) blocks.piece[u * BLOCKS + b] = static_cast<int32_t>(u * BLOCKS + b);
  }
  radix_sort(blocks.start, blocks.piece, hash.size() - 1);
  const int64_t count = hash.size() / Z;
  for (int64_t start : blocks.start) {
    const int64_t first = start / Z;
    if (blocks.row.empty() || blocks.row.back() < first) blocks.row.push_back(first);
    if (first + 1 < count && blocks.row.back() < first + 1) blocks.row.push_back(first + 1);
  }
  // A block that starts in the last row goes on in row 0.
  if (!blocks.start.empty() && blocks.start.back() / Z == count - 1 && blocks.row.front() != 0)
    blocks.row.insert(blocks.row.begin(), 0);
  return blocks;
}

// Adds what the blocks that start in array row `from` send to that row, or (`Spill`) to the next one.
template <bool Spill>
void gather(const Table& table, const Call& call, const Blocks& blocks, int64_t from, float* grad) {
  const auto begin = std::lower_bound(blocks.start.begin(), blocks.start.end(), from * Z);
  for (size_t k = begin - blocks.start.begin(); k < blocks.start.size() && blocks.start[k] < (from + 1) * Z; k++) {
    const int32_t piece = blocks.piece[k];
    const int b = piece % BLOCKS;
    const int64_t inside = blocks.start[k] - from * Z, here = std::min<int64_t>(length_of(b), Z - inside);
    const float* g = call.grad_rows + table.counts->rows_at + static_cast<int64_t>(piece / BLOCKS) * D + b * Z;
    if constexpr (Spill)
      accumulate(grad, g + here, blocks.sign[piece], length_of(b) - here);
    else
      accumulate(grad + inside, g, blocks.sign[piece], here);
  }
}

}  // namespace

extern "C" void recemb_table_forward(const Table* table, Call* call) {
  const Hash hash(*table);
  const int64_t size = hash.size();
#pragma omp for schedule(static) nowait
  for (int64_t u = 0; u < table->level[0].nodes; u++) {
    int64_t start[BLOCKS];
    float sign[BLOCKS];
    hash.place(table->keys[u], start, sign);
    float* row = call->rows + table->counts->rows_at + u * D;
    for (int b = 0; b < BLOCKS; b++) {
      const int64_t here = std::min<int64_t>(length_of(b), size - start[b]);
      for (int64_t j = 0; j < here; j++) row[b * Z + j] = sign[b] * table->param[0][start[b] + j];
      for (int64_t j = here; j < length_of(b); j++) row[b * Z + j] = sign[b] * table->param[0][j - here];
    }
  }
}

extern "C" void recemb_table_backward(const Table* table, Call* call) {
#pragma omp single
  call->scratch = new Blocks(sort_blocks(*table));
  const Blocks& blocks = *static_cast<const Blocks*>(call->scratch);
  const int64_t count = table->constants[0];
#pragma omp for schedule(static)
  for (int64_t k = 0; k < static_cast<int64_t>(blocks.row.size()); k++) {
    float grad[Z] = {};
    const int64_t row = blocks.row[k];
    gather<false>(*table, *call, blocks, row, grad);
    gather<true>(*table, *call, blocks, row ? row - 1 : count - 1, grad);
    finish(*table, *call, row, grad);
  }
#pragma omp single
  delete static_cast<Blocks*>(call->scratch);
}
