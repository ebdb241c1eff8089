// How parameters are stored for inference. -DSTORAGE=s_1,s_2,... says it of each parameter of a table; without it
// all are float32, and train. Rows of the other kinds are widened when they are read:
//
//   FLOAT16   [W] halves
//   INT8      [W] bytes u, then scale and bias as halves: the row is scale * u + bias
//   TBE_INT8  scale and bias, then [W] bytes, padded to 16: the same in fbgemm's order, for its own tables
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace recemb {

enum Stored { FLOAT32 = 0, FLOAT16 = 1, INT8 = 2, TBE_INT8 = 3 };

// Of this library alone: every table's library has storages of its own under the same names.
namespace {

#ifdef STORAGE
constexpr int STORAGES[] = {STORAGE};
constexpr int stored_as(int k) { return STORAGES[k]; }
constexpr bool TRAINS = false;
#else
constexpr int stored_as(int) { return FLOAT32; }
constexpr bool TRAINS = true;
#endif

constexpr int64_t row_bytes(int k, int64_t width) {
  switch (stored_as(k)) {
    case FLOAT32: return 4 * width;
    case FLOAT16: return 2 * width;
    case INT8: return width + 4;
    default: return (width + 4 + 15) / 16 * 16;
  }
}

const uint8_t* stored_row(const float* base, int k, int64_t width, int64_t row) {
  return reinterpret_cast<const uint8_t*>(base) + row * row_bytes(k, width);
}

// Asks for the first bytes of a row ahead of its use.
[[gnu::always_inline]] inline void prefetch_stored(const float* base, int k, int64_t width, int64_t row) {
  const uint8_t* at = stored_row(base, k, width, row);
  for (int64_t j = 0; j < std::min<int64_t>(row_bytes(k, width), 512); j += 64) __builtin_prefetch(at + j);
}

float widen(uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  // Exponent and fraction moved to a float's places; the product puts the exponents' bases right, and what was
  // subnormal with them.
  uint32_t bits = uint32_t{half & 0x7FFFu} << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  value = (half & 0x7C00u) == 0x7C00u ? (half & 0x3FFu ? __builtin_nanf("") : __builtin_inff()) : value * 0x1p112f;
  return half & 0x8000u ? -value : value;
#endif
}

template <int W>
void widen_halves(const uint8_t* from, float* to) {
  int j = 0;
#if defined(__F16C__)
  for (; j + 8 <= W; j += 8)
    _mm256_storeu_ps(to + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * j))));
#endif
  for (; j < W; j++) {
    uint16_t half;
    std::memcpy(&half, from + 2 * j, 2);
    to[j] = widen(half);
  }
}

template <int W>
void widen_bytes(const uint8_t* from, const uint8_t* parameters, float* to) {
  uint16_t scale_bias[2];
  std::memcpy(scale_bias, parameters, 4);
  const float scale = widen(scale_bias[0]), bias = widen(scale_bias[1]);
#pragma omp simd
  for (int j = 0; j < W; j++) to[j] = scale * static_cast<float>(from[j]) + bias;
}

// Row `row` of parameter k, W wide: where it lies, or widened into room[W].
template <int k, int W>
const float* read_row(const float* base, int64_t row, float* room) {
  if constexpr (stored_as(k) == FLOAT32) return base + row * W;
  if constexpr (stored_as(k) == FLOAT16) widen_halves<W>(stored_row(base, k, W, row), room);
  const uint8_t* at = stored_row(base, k, W, row);
  if constexpr (stored_as(k) == INT8) widen_bytes<W>(at, at + W, room);
  if constexpr (stored_as(k) == TBE_INT8) widen_bytes<W>(at + 4, at, room);
  return room;
}

}  // namespace
}  // namespace recemb
