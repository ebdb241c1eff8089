// Eight floats at a time, in GCC's and clang's vector extension: AVX on x86, NEON pairs on Arm.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace recemb {

typedef float v8 __attribute__((vector_size(32), aligned(4)));
constexpr int LANES = 8;

constexpr int round_up(int n) { return (n + LANES - 1) / LANES * LANES; }

static inline v8 load(const float* p) { return *reinterpret_cast<const v8*>(p); }
static inline void store(float* p, v8 x) { *reinterpret_cast<v8*>(p) = x; }
static inline v8 splat(float x) { return v8{x, x, x, x, x, x, x, x}; }

static inline float sum(v8 x) {
  return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7]));
}

// Writes the sums of four vectors to out[0..3] in a third of the shuffles that four single sums need.
static inline void sum4(v8 a, v8 b, v8 c, v8 d, float* out) {
#if defined(__AVX2__)
  __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d);
  __m256 abcd = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
#else
  out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
#endif
}

// C[M][N] = A[M][lda] B[K][N], N a multiple of LANES: blocks of 2 rows by 4 vectors stay in registers.
template <int M, int K, int N>
static inline void multiply(const float* A, int lda, const float* B, float* C) {
  constexpr int V = N / LANES;
  for (int m0 = 0; m0 < M; m0 += 2) {
    constexpr int MB = M == 1 ? 1 : 2;
    const bool pair = MB == 2 && m0 + 1 < M;
    const float* a0 = A + m0 * lda;
    const float* a1 = pair ? a0 + lda : a0;
    for (int v0 = 0; v0 < V; v0 += 4) {
      const int width = V - v0 < 4 ? V - v0 : 4;
      v8 c0[4] = {}, c1[4] = {};
      if (width == 4) {
        for (int k = 0; k < K; k++) {
          const float* b = B + k * N + v0 * LANES;
          const v8 x0 = splat(a0[k]), x1 = splat(a1[k]);
          for (int v = 0; v < 4; v++) {
            const v8 y = load(b + v * LANES);
            c0[v] += x0 * y;
            c1[v] += x1 * y;
          }
        }
      } else {
        for (int k = 0; k < K; k++) {
          const float* b = B + k * N + v0 * LANES;
          const v8 x0 = splat(a0[k]), x1 = splat(a1[k]);
          for (int v = 0; v < width; v++) {
            const v8 y = load(b + v * LANES);
            c0[v] += x0 * y;
            c1[v] += x1 * y;
          }
        }
      }
      for (int v = 0; v < width; v++) {
        store(C + m0 * N + (v0 + v) * LANES, c0[v]);
        if (pair) store(C + (m0 + 1) * N + (v0 + v) * LANES, c1[v]);
      }
    }
  }
}

// dA[M][lda] += dC[M][N] B[K][N]^T
template <int M, int K, int N>
static inline void multiply_transposed(const float* dC, const float* B, float* dA, int lda) {
  constexpr int V = N / LANES;
  for (int m = 0; m < M; m++) {
    const float* d = dC + m * N;
    constexpr int FOURS = K / 4 * 4;
    for (int k = 0; k < FOURS; k += 4) {
      v8 s[4] = {};
      for (int v = 0; v < V; v++) {
        const v8 x = load(d + v * LANES);
        for (int q = 0; q < 4; q++) s[q] += x * load(B + (k + q) * N + v * LANES);
      }
      float four[4];
      sum4(s[0], s[1], s[2], s[3], four);
      for (int q = 0; q < 4; q++) dA[m * lda + k + q] += four[q];
    }
    for (int k = FOURS; k < K; k++) {
      v8 s = {};
      for (int v = 0; v < V; v++) s += load(d + v * LANES) * load(B + k * N + v * LANES);
      dA[m * lda + k] += sum(s);
    }
  }
}

// dB[K][N] += A[M][lda]^T dC[M][N]
template <int M, int K, int N>
static inline void accumulate_outer(const float* A, int lda, const float* dC, float* dB) {
  constexpr int V = N / LANES;
  for (int k = 0; k < K; k++) {
    float* b = dB + k * N;
    for (int v = 0; v < V; v++) {
      v8 s = load(b + v * LANES);
      for (int m = 0; m < M; m++) s += splat(A[m * lda + k]) * load(dC + m * N + v * LANES);
      store(b + v * LANES, s);
    }
  }
}

// out[M][Q] = P[M][K] T[Q][K]^T, K a multiple of LANES
template <int M, int K, int Q>
static inline void dot_rows(const float* P, const float* T, float* out) {
  constexpr int V = K / LANES;
  for (int m = 0; m < M; m++) {
    const float* p = P + m * K;
    constexpr int FOURS = Q / 4 * 4;
    for (int e = 0; e < FOURS; e += 4) {
      v8 s[4] = {};
      for (int v = 0; v < V; v++) {
        const v8 x = load(p + v * LANES);
        for (int q = 0; q < 4; q++) s[q] += x * load(T + (e + q) * K + v * LANES);
      }
      sum4(s[0], s[1], s[2], s[3], out + m * Q + e);
    }
    for (int e = FOURS; e < Q; e++) {
      v8 s = {};
      for (int v = 0; v < V; v++) s += load(p + v * LANES) * load(T + e * K + v * LANES);
      out[m * Q + e] = sum(s);
    }
  }
}

// dP[M][K] += dO[M][Q] T[Q][K]
template <int M, int K, int Q>
static inline void spread_rows(const float* dO, const float* T, float* dP) {
  for (int m = 0; m < M; m++)
    for (int v = 0; v < K; v += LANES) {
      v8 s = load(dP + m * K + v);
      for (int e = 0; e < Q; e++) s += splat(dO[m * Q + e]) * load(T + e * K + v);
      store(dP + m * K + v, s);
    }
}

// dT[Q][K] += dO[M][Q]^T P[M][K]
template <int M, int K, int Q>
static inline void gather_rows(const float* dO, const float* P, float* dT) {
  for (int e = 0; e < Q; e++)
    for (int v = 0; v < K; v += LANES) {
      v8 s = load(dT + e * K + v);
      for (int m = 0; m < M; m++) s += splat(dO[m * Q + e]) * load(P + m * K + v);
      store(dT + e * K + v, s);
    }
}

}  // namespace recemb
