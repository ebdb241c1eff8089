// The sum of the two streams of a cached batch, and its gradient for both. By one thread while a second one would
// take longer to wake than the work takes: torch would wake it from 32,768 numbers.
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

// Numbers from which a second thread saves more than it costs.
constexpr int64_t SERIAL = 1 << 18;

// `_Merge` of __init__.py.
struct Merge {
  int64_t batch, width, pooled_width, num_pieces, threads;
  const int64_t* pieces;  // first column, how many, first one of the cold stream or -1; from left to right
};

}  // namespace

extern "C" {

int64_t recemb_split_merge_size() { return sizeof(Merge); }

// out[batch][width] = hot + cold
void recemb_split_merge(const Merge* merge, const float* pooled, float* out) {
  const Merge& m = *merge;
#pragma omp parallel for num_threads(m.threads) if (m.batch * m.width >= SERIAL)
  for (int64_t b = 0; b < m.batch; b++) {
    const float* row = pooled + b * m.pooled_width;
    float* sum = out + b * m.width;
    for (int64_t p = 0; p < m.num_pieces; p++) {
      const int64_t first = m.pieces[3 * p], columns = m.pieces[3 * p + 1], cold = m.pieces[3 * p + 2];
      if (cold < 0)
        std::memcpy(sum + first, row + first, columns * sizeof *sum);
      else
        for (int64_t j = 0; j < columns; j++) sum[first + j] = row[first + j] + row[cold + j];
    }
  }
}

// both[batch][pooled_width] = grad, then grad of the cached columns again
void recemb_split_spread(const Merge* merge, const float* grad, float* both) {
  const Merge& m = *merge;
#pragma omp parallel for num_threads(m.threads) if (m.batch * m.width >= SERIAL)
  for (int64_t b = 0; b < m.batch; b++) {
    const float* row = grad + b * m.width;
    float* to = both + b * m.pooled_width;
    std::memcpy(to, row, m.width * sizeof *to);
    for (int64_t p = 0; p < m.num_pieces; p++) {
      const int64_t first = m.pieces[3 * p], columns = m.pieces[3 * p + 1], cold = m.pieces[3 * p + 2];
      if (cold >= 0) std::memcpy(to + cold, row + first, columns * sizeof *to);
    }
  }
}
}
