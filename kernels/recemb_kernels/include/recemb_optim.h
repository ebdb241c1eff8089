// One optimizer step on one row of a parameter, given its whole gradient. The formulas are torch.optim's, and
// torchrec.optim.RowWiseAdagrad's for the row-wise one.
#pragma once
#include <cmath>
#include <cstdint>

namespace recemb {

enum Optimizer : int64_t { GRADIENT = 0, SGD = 1, ADAGRAD = 2, ROWWISE_ADAGRAD = 3, ADAM = 4 };

// Rates of one parameter at one step.
struct Hyper {
  float lr, eps, beta1, beta2;
  float root;           // Adam: sqrt(1 - beta2^step)
  float rest1, rest2;   // 1 - beta, subtracted in double: a float has few digits left there
};

inline Hyper hyper_at(int64_t kind, double step, double lr, double eps, double beta1, double beta2, double lr_decay) {
  double rate = lr, root = 1;
  if (kind == ADAGRAD || kind == ROWWISE_ADAGRAD) rate = lr / (1 + (step - 1) * lr_decay);
  if (kind == ADAM) rate = lr / (1 - std::pow(beta1, step)), root = std::sqrt(1 - std::pow(beta2, step));
  return {static_cast<float>(rate),  static_cast<float>(eps),       static_cast<float>(beta1),    static_cast<float>(beta2),
          static_cast<float>(root), static_cast<float>(1 - beta1), static_cast<float>(1 - beta2)};
}

// w[W] is updated in place; `state` and `state2` are the row's own optimizer state (one float for row-wise). None of
// them overlap: else a row's step is no vectors.
template <int64_t KIND, int W>
static inline void step_row(const Hyper& h, float* __restrict w, const float* __restrict g, float* __restrict state,
                            float* __restrict state2) {
  if constexpr (KIND == SGD) {
    for (int i = 0; i < W; i++) w[i] -= h.lr * g[i];
  } else if constexpr (KIND == ADAGRAD) {
    for (int i = 0; i < W; i++) {
      state[i] += g[i] * g[i];
      w[i] -= h.lr * g[i] / (std::sqrt(state[i]) + h.eps);
    }
  } else if constexpr (KIND == ROWWISE_ADAGRAD) {
    float square = 0;
#pragma omp simd reduction(+ : square)
    for (int i = 0; i < W; i++) square += g[i] * g[i];
    state[0] += square / static_cast<float>(W);
    const float scale = h.lr / (std::sqrt(state[0]) + h.eps);
    for (int i = 0; i < W; i++) w[i] -= scale * g[i];
  } else {
    for (int i = 0; i < W; i++) {
      state[i] = h.beta1 * state[i] + h.rest1 * g[i];
      state2[i] = h.beta2 * state2[i] + h.rest2 * g[i] * g[i];
      w[i] -= h.lr * state[i] / (std::sqrt(state2[i]) / h.root + h.eps);
    }
  }
}

}  // namespace recemb
