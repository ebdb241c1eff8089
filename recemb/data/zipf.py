"""Bounded Zipf ranks by rejection-inversion, without a table of N probabilities."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class BoundedZipf:
    """P(rank = k) = k^-a / sum_{j<=N} j^-a for k = 1..N, sampled exactly.

    Rejection-inversion (W. Hörmann and G. Derflinger, "Rejection-inversion to generate variates from monotone
    discrete distributions", ACM TOMACS 6(3), 1996): invert the integral H of the continuous hat x^-a, round,
    and reject the little that the hat has too much. Memory does not depend on N; fewer than 1 % of the draws
    are repeated at an exponent of 1.05.

    Args:
        num_ranks: N >= 1.
        exponent: a > 0, a != 1 (Criteo's tables are near 1.05).
    """

    def __init__(self, num_ranks: int, exponent: float) -> None:
        if num_ranks < 1 or exponent <= 0 or exponent == 1.0:
            raise ValueError(
                f"num_ranks {num_ranks} must be >= 1 and exponent {exponent} > 0 and other than 1"
            )
        self.num_ranks = num_ranks
        self.exponent = exponent
        self._one_minus_a = 1.0 - exponent
        self._lowest = float(self._hat_integral(np.array(1.5)) - 1.0)
        self._highest = float(self._hat_integral(np.array(num_ranks + 0.5)))
        second = self._hat_integral(np.array(2.5)) - 2.0**-exponent
        self._squeeze = float(2.0 - self._invert(second))

    def _hat_integral(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        result: npt.NDArray[np.float64] = np.power(x, self._one_minus_a) / self._one_minus_a
        return result

    def _invert(self, u: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        result: npt.NDArray[np.float64] = np.power(u * self._one_minus_a, 1.0 / self._one_minus_a)
        return result

    def _accept(self, u: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        x = self._invert(u)
        rank = np.clip(np.floor(x + 0.5), 1.0, float(self.num_ranks))
        accepted = rank - x <= self._squeeze
        unsure = np.flatnonzero(~accepted)
        candidate = rank[unsure]
        accepted[unsure] = u[unsure] >= self._hat_integral(candidate + 0.5) - np.power(
            candidate, -self.exponent
        )
        return rank, accepted

    def sample(self, generator: np.random.Generator, size: int) -> npt.NDArray[np.int64]:
        """``size`` ranks in [1, N], int64."""
        if self.num_ranks == 1:
            return np.ones(size, np.int64)
        ranks, accepted = self._accept(self._uniform(generator, size))
        open_positions = np.flatnonzero(~accepted)
        while open_positions.size:
            redrawn, accepted = self._accept(self._uniform(generator, open_positions.size))
            ranks[open_positions[accepted]] = redrawn[accepted]
            open_positions = open_positions[~accepted]
        return ranks.astype(np.int64)

    def _uniform(self, generator: np.random.Generator, size: int) -> npt.NDArray[np.float64]:
        return self._lowest + generator.random(size) * (self._highest - self._lowest)
