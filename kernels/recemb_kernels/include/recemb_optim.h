// One optimizer step on one row of a parameter, given its whole gradient. The formulas are torch.optim's, and
// torchrec.optim.RowWiseAdagrad's for the row-wise one.
#pragma once
#include <cmath>
#include <cstdint>

namespace recemb {

enum Optimizer : int64_t { GRADIENT = 0, SGD = 1, ADAGRAD = 2, ROWWISE_ADAGRAD = 3, ADAM = 4 };

struct Hyper {
  double lr, eps, beta1, beta2, step;
};

// w[n] is updated in place; `state` and `state2` are the row's own optimizer state (one float for row-wise).
static inline void update_row(int64_t kind, const Hyper& h, int64_t n, float* w, const float* g, float* state,
                              float* state2) {
  const float lr = static_cast<float>(h.lr), eps = static_cast<float>(h.eps);
  switch (kind) {
    case SGD:
      for (int64_t i = 0; i < n; i++) w[i] -= lr * g[i];
      break;
    case ADAGRAD:
      for (int64_t i = 0; i < n; i++) {
        state[i] += g[i] * g[i];
        w[i] -= lr * g[i] / (std::sqrt(state[i]) + eps);
      }
      break;
    case ROWWISE_ADAGRAD: {
      float square = 0;
      for (int64_t i = 0; i < n; i++) square += g[i] * g[i];
      state[0] += square / static_cast<float>(n);
      const float scale = lr / (std::sqrt(state[0]) + eps);
      for (int64_t i = 0; i < n; i++) w[i] -= scale * g[i];
      break;
    }
    case ADAM: {
      const float b1 = static_cast<float>(h.beta1), b2 = static_cast<float>(h.beta2);
      const float step_size = static_cast<float>(h.lr / (1 - std::pow(h.beta1, h.step)));
      const float root = static_cast<float>(std::sqrt(1 - std::pow(h.beta2, h.step)));
      for (int64_t i = 0; i < n; i++) {
        state[i] = b1 * state[i] + (1 - b1) * g[i];
        state2[i] = b2 * state2[i] + (1 - b2) * g[i] * g[i];
        w[i] -= step_size * state[i] / (std::sqrt(state2[i]) / root + eps);
      }
      break;
    }
    default:
      break;
  }
}

}  // namespace recemb
