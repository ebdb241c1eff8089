// Vectors in GCC's and clang's extension, and the small matrix products made of them: eight floats a vector (AVX,
// two NEON registers), sixteen where AVX-512 is there and a row divides into them.
//
// Rows of the left and of the result are given as pointers, so that rows scattered in memory multiply as one
// matrix. Every element sums over its inner dimension in one order, which depends on sizes alone: chains of CHAIN
// products, or up to two, then the chains, because the rounding error of one long chain grows with its length.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace recemb {

constexpr int PAD = 8;  // rows of packed matrices are padded to a multiple of this
constexpr int round_up(int n) { return (n + PAD - 1) / PAD * PAD; }

#if defined(__AVX512F__)
// lanes, accumulators of a block of a product and of an outer product, vectors of a block's columns
constexpr int WIDEST = 16, BLOCK = 24, OUTER = 16, PANEL = 4;
#else
constexpr int WIDEST = 8, BLOCK = 12, OUTER = 8, PANEL = 2;
#endif
constexpr int CHAIN = 16;
constexpr int lanes_of(int n) { return n % WIDEST == 0 ? WIDEST : PAD; }
constexpr int smaller(int a, int b) { return a < b ? a : b; }

template <int LANES>
struct Vector;
template <>
struct Vector<8> {
  typedef float type __attribute__((vector_size(32), aligned(4), may_alias));
};
template <>
struct Vector<16> {
  typedef float type __attribute__((vector_size(64), aligned(4), may_alias));
};

template <int L>
static inline typename Vector<L>::type load(const float* p) {
  return *reinterpret_cast<const typename Vector<L>::type*>(p);
}
template <int L>
static inline void store(float* p, typename Vector<L>::type x) {
  *reinterpret_cast<typename Vector<L>::type*>(p) = x;
}

// s + x * y, fused where the machine can. Spelt out: of a sum of two products the compiler may fuse either one, and
// chooses differently from one blocking to the next.
static inline Vector<8>::type multiply_add(Vector<8>::type s, Vector<8>::type x, Vector<8>::type y) {
#if defined(__FMA__)
  return (Vector<8>::type)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)s);
#else
  return s + x * y;
#endif
}
static inline Vector<8>::type spread(float x, Vector<8>::type) { return Vector<8>::type{x, x, x, x, x, x, x, x}; }
#if defined(__AVX512F__)
static inline Vector<16>::type multiply_add(Vector<16>::type s, Vector<16>::type x, Vector<16>::type y) {
  return (Vector<16>::type)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)s);
}
static inline Vector<16>::type spread(float x, Vector<16>::type) { return (Vector<16>::type)_mm512_set1_ps(x); }
#endif

static inline Vector<8>::type fold(Vector<8>::type x) { return x; }
#if defined(__AVX512F__)
static inline Vector<8>::type fold(Vector<16>::type x) {
  const __m512 whole = (__m512)x;
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(whole), 1));
  return (Vector<8>::type)_mm256_add_ps(_mm512_castps512_ps256(whole), high);
}
#endif

// Writes the sums of four vectors to out[0..3] in a third of the shuffles that four single sums need. By their lanes: a
// type that is an argument of a template forgets that its vectors may lie anywhere.
template <int L>
static inline void sum4(const typename Vector<L>::type* s, float* out) {
  const Vector<8>::type a = fold(s[0]), b = fold(s[1]), c = fold(s[2]), d = fold(s[3]);
#if defined(__AVX2__)
  const __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d);
  const __m256 abcd = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
#else
  const Vector<8>::type* x[4] = {&a, &b, &c, &d};
  for (int q = 0; q < 4; q++) {
    const Vector<8>::type& v = *x[q];
    out[q] = ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
  }
#endif
}

// MB rows by NV vectors of columns over k in [from, to), all sums in registers.
template <int MB, int NV, int L, int K, int N, bool ADD>
static inline void multiply_block(const float* const* a, const float* B, float* const* c, int column, int from, int to) {
  typename Vector<L>::type s[MB][NV] = {};
  for (int k = from; k < to; k++) {
    typename Vector<L>::type b[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) b[v] = load<L>(B + k * N + column + v * L);
#pragma GCC unroll 24
    for (int m = 0; m < MB; m++) {
      const auto x = spread(a[m][k], b[0]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) s[m][v] = multiply_add(s[m][v], x, b[v]);
    }
  }
#pragma GCC unroll 24
  for (int m = 0; m < MB; m++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) {
      float* to_row = c[m] + column + v * L;
      store<L>(to_row, ADD ? load<L>(to_row) + s[m][v] : s[m][v]);
    }
}

template <int MB, int NV, int L, int K, int N, bool ADD>
static inline void multiply_chains(const float* const* a, const float* B, float* const* c, int column) {
  constexpr int FIRST = K > 2 * CHAIN ? CHAIN : K;
  multiply_block<MB, NV, L, K, N, ADD>(a, B, c, column, 0, FIRST);
  for (int k = FIRST; k < K; k += CHAIN)
    multiply_block<MB, NV, L, K, N, true>(a, B, c, column, k, smaller(k + CHAIN, K));
}

template <int NV, int L, int K, int N, bool ADD>
static inline void multiply_panel(int64_t rows, const float* const* a, const float* B, float* const* c, int column) {
  constexpr int MB = BLOCK / NV;
  int64_t m = 0;
  for (; m + MB <= rows; m += MB) multiply_chains<MB, NV, L, K, N, ADD>(a + m, B, c + m, column);
  // Few rows at once leave the multipliers waiting for each other's sums.
  if constexpr (MB > 6)
    for (; m + 6 <= rows; m += 6) multiply_chains<6, NV, L, K, N, ADD>(a + m, B, c + m, column);
  if constexpr (MB > 4)
    for (; m + 4 <= rows; m += 4) multiply_chains<4, NV, L, K, N, ADD>(a + m, B, c + m, column);
  for (; m + 2 <= rows; m += 2) multiply_chains<2, NV, L, K, N, ADD>(a + m, B, c + m, column);
  if (m < rows) multiply_chains<1, NV, L, K, N, ADD>(a + m, B, c + m, column);
}

// c[r][0..N) (+)= a[r][0..K) B[K][N], N a multiple of PAD
template <int K, int N, bool ADD>
static inline void multiply_rows(int64_t rows, const float* const* a, const float* B, float* const* c) {
  constexpr int L = lanes_of(N), V = N / L, NV = smaller(V, PANEL), REST = V % NV;
  for (int v = 0; v + NV <= V; v += NV) multiply_panel<NV, L, K, N, ADD>(rows, a, B, c, v * L);
  if constexpr (REST > 0) multiply_panel<REST, L, K, N, ADD>(rows, a, B, c, (V - REST) * L);
}

template <int KB, int NV, int L, int N, bool ADD>
static inline void outer_block(int64_t rows, const float* const* a, const float* const* c, float* T, int k, int column) {
  typename Vector<L>::type s[KB][NV] = {};
  for (int64_t r = 0; r < rows; r++) {
    typename Vector<L>::type y[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) y[v] = load<L>(c[r] + column + v * L);
#pragma GCC unroll 24
    for (int i = 0; i < KB; i++) {
      const auto x = spread(a[r][k + i], y[0]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) s[i][v] = multiply_add(s[i][v], x, y[v]);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < KB; i++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) {
      float* to = T + (k + i) * N + column + v * L;
      store<L>(to, ADD ? load<L>(to) + s[i][v] : s[i][v]);
    }
}

template <int NV, int L, int K, int N, bool ADD>
static inline void outer_panel(int64_t rows, const float* const* a, const float* const* c, float* T, int column) {
  constexpr int KB = smaller(K, OUTER / NV), REST = K % KB;
  for (int k = 0; k + KB <= K; k += KB) outer_block<KB, NV, L, N, ADD>(rows, a, c, T, k, column);
  if constexpr (REST > 0) outer_block<REST, NV, L, N, ADD>(rows, a, c, T, K - REST, column);
}

template <int K, int N, bool ADD>
static inline void outer_chain(int64_t rows, const float* const* a, const float* const* c, float* T) {
  constexpr int L = lanes_of(N), V = N / L, NV = smaller(V, PANEL), REST = V % NV;
  for (int v = 0; v + NV <= V; v += NV) outer_panel<NV, L, K, N, ADD>(rows, a, c, T, v * L);
  if constexpr (REST > 0) outer_panel<REST, L, K, N, ADD>(rows, a, c, T, (V - REST) * L);
}

// T[K][N] = or, with `add`, += the sum over r of a[r][0..K)^T c[r][0..N), N a multiple of PAD
template <int K, int N>
static inline void add_outer(int64_t rows, const float* const* a, const float* const* c, float* T, bool add) {
  for (int64_t r = 0; r < rows; r += CHAIN) {
    const int64_t chain = rows - r < CHAIN ? rows - r : CHAIN;
    if (r || add)
      outer_chain<K, N, true>(chain, a + r, c + r, T);
    else
      outer_chain<K, N, false>(chain, a, c, T);
  }
}

// to[COLUMNS][STRIDE] = from[ROWS][COLUMNS]^T, COLUMNS a multiple of PAD
template <int ROWS, int COLUMNS, int STRIDE>
static inline void transpose(const float* from, float* to) {
  constexpr int EIGHTS = ROWS / 8 * 8;
#if defined(__AVX2__)
  for (int i = 0; i < EIGHTS; i += 8)
    for (int j = 0; j < COLUMNS; j += 8) {
      __m256 r[8], s[8];
#pragma GCC unroll 8
      for (int k = 0; k < 8; k++) r[k] = _mm256_loadu_ps(from + (i + k) * COLUMNS + j);
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) {
        s[2 * k] = _mm256_unpacklo_ps(r[2 * k], r[2 * k + 1]);
        s[2 * k + 1] = _mm256_unpackhi_ps(r[2 * k], r[2 * k + 1]);
      }
#pragma GCC unroll 2
      for (int k = 0; k < 8; k += 4) {
        r[k] = _mm256_shuffle_ps(s[k], s[k + 2], 0x44), r[k + 1] = _mm256_shuffle_ps(s[k], s[k + 2], 0xEE);
        r[k + 2] = _mm256_shuffle_ps(s[k + 1], s[k + 3], 0x44), r[k + 3] = _mm256_shuffle_ps(s[k + 1], s[k + 3], 0xEE);
      }
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) {
        _mm256_storeu_ps(to + (j + k) * STRIDE + i, _mm256_permute2f128_ps(r[k], r[k + 4], 0x20));
        _mm256_storeu_ps(to + (j + k + 4) * STRIDE + i, _mm256_permute2f128_ps(r[k], r[k + 4], 0x31));
      }
    }
  constexpr int REST = EIGHTS;
#else
  constexpr int REST = 0;
#endif
  for (int j = 0; j < COLUMNS; j++)
    for (int i = REST; i < ROWS; i++) to[j * STRIDE + i] = from[i * COLUMNS + j];
}

#if defined(__AVX512F__)
// The sums of sixteen vectors, in their order; the lanes of each are added in sum4's order, so that a sum has the same
// bits whichever takes it.
static inline Vector<16>::type sum16(const Vector<16>::type* s) {
  const auto add_halves = [](__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xEE));
  };
  const auto add_neighbours = [](__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x88), _mm512_shuffle_ps(x, y, 0xDD));
  };
  __m512 fours[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {  // sums 8 (j / 2) + 2 (j % 2) + {0, 1, 4, 5}
    const Vector<16>::type* of = s + j / 2 * 8 + j % 2 * 2;
    fours[j] = add_neighbours(add_halves((__m512)of[0], (__m512)of[4]), add_halves((__m512)of[1], (__m512)of[5]));
  }
  const __m512 low = add_neighbours(fours[0], fours[1]), high = add_neighbours(fours[2], fours[3]);
  return (Vector<16>::type)_mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88),
                                         _mm512_shuffle_f32x4(low, high, 0xDD));
}

// MB rows of P with QB rows of T, sixteen sums at once: out[m * STRIDE + q].
template <int MB, int QB, int K, int STRIDE>
static inline void dot_block(const float* P, const float* T, float* out) {
  constexpr int L = 16;
  Vector<L>::type s[MB * QB] = {};
#pragma GCC unroll 2
  for (int k = 0; k < K; k += L) {
    Vector<L>::type x[MB];
#pragma GCC unroll 4
    for (int m = 0; m < MB; m++) x[m] = load<L>(P + m * K + k);
#pragma GCC unroll 16
    for (int q = 0; q < QB; q++) {
      const Vector<L>::type y = load<L>(T + q * K + k);
#pragma GCC unroll 4
      for (int m = 0; m < MB; m++) s[m * QB + q] = multiply_add(s[m * QB + q], x[m], y);
    }
  }
  if constexpr (STRIDE == QB || MB == 1) {
    store<L>(out, sum16(s));
  } else {
    float sums[MB * QB];
    store<L>(sums, sum16(s));
    for (int m = 0; m < MB; m++)
      for (int q = 0; q < QB; q++) out[m * STRIDE + q] = sums[m * QB + q];
  }
}
#endif

// out[M][STRIDE] = P[M][K] T[Q][K]^T, K a multiple of PAD
template <int M, int K, int Q, int STRIDE = Q>
static inline void dot_rows(const float* P, const float* T, float* out) {
#if defined(__AVX512F__)
  constexpr int MB = M % 4 == 0 ? 4 : M % 2 == 0 ? 2 : 1, QB = 16 / MB;
  if constexpr (K % 16 == 0 && Q % QB == 0) {
    for (int m = 0; m < M; m += MB)
      for (int q = 0; q < Q; q += QB)
        dot_block<MB, QB, K, STRIDE>(P + m * K, T + q * K, out + m * STRIDE + q);
    return;
  }
#endif
  constexpr int L = lanes_of(K), FOURS = (Q + 3) / 4 * 4;
  float four[4];
  for (int m = 0; m < M; m++)
    for (int e = 0; e < FOURS; e += 4) {
      typename Vector<L>::type s[4] = {};
      for (int k = 0; k < K; k += L) {
        const typename Vector<L>::type x = load<L>(P + m * K + k);
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++)
          if (Q % 4 == 0 || e + q < Q) s[q] = multiply_add(s[q], x, load<L>(T + (e + q) * K + k));
      }
      sum4<L>(s, four);
      for (int q = 0; q < 4 && e + q < Q; q++) out[m * STRIDE + e + q] = four[q];
    }
}

}  // namespace recemb
