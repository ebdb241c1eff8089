"""The planted teacher of the synthetic click log: a known click probability for every row, without any table.

With g_j the standardised dense features, e(k, i) and v(k, i) the effect and the factors of id i of feature
k::

    logit = bias + s_1 * main + s_2 * pairs + s_3 * dense
    main  = sum_k w_k e(k, i_k)                            what an embedding table can learn of each id
    pairs = sum_{k<l} <v(k, i_k), v(l, i_l)>               what their interactions can learn, rank 3
    dense = sum_j d_j g_j                                  what a model without tables can learn

e and the three components of v are uniform in [-1, 1), read from the four 16-bit words of
SplitMix64(seed, k, i) (S. Vigna's finaliser; G. Steele et al., "Fast splittable pseudorandom number
generators", OOPSLA 2014), so the teacher of a table of any number of rows takes no memory and is the same on
every machine. The scales s_1..s_3 and the bias are fitted on a pilot chunk: each part has the standard
deviation given below and the mean click probability is the asked one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from recemb.data.layout import NUM_DENSE

# Standard deviations of the logit's parts: together an AUC near 0.82 at 25 % clicks, of which the dense part
# alone reaches about 0.62.
MAIN_SCALE: Final = 1.25
PAIRS_SCALE: Final = 0.75
DENSE_SCALE: Final = 0.6
FACTOR_RANK: Final = 3

_GOLDEN: Final = 0x9E3779B97F4A7C15
_MASK: Final = 2**64 - 1


def _splitmix64_scalar(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def _hash_ids(key: int, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """SplitMix64 of ``key + id * golden`` as float32 [B, 4], uniform in [-1, 1)."""
    state = ids.astype(np.uint64)
    state *= np.uint64(_GOLDEN)
    state += np.uint64(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state ^= state >> np.uint64(shift)
        state *= np.uint64(factor)
    state ^= state >> np.uint64(31)
    words = state.astype("<u8", copy=False).view("<i2").reshape(-1, 4)
    return words.astype(np.float32) * np.float32(2.0**-15)


@dataclass(frozen=True)
class _Parts:
    main: npt.NDArray[np.float64]
    pairs: npt.NDArray[np.float64]
    dense: npt.NDArray[np.float64]


class Teacher:
    """The click probability of a row.

    Args:
        seed: the teacher's seed.
        num_features: F.
    """

    def __init__(self, seed: int, num_features: int) -> None:
        root = _splitmix64_scalar((seed + 1) * _GOLDEN & _MASK)
        self._keys = [
            _splitmix64_scalar(root + (feature + 1) * _GOLDEN & _MASK) for feature in range(num_features)
        ]
        weights = _hash_ids(_splitmix64_scalar(root ^ 0x5EED), np.arange(max(num_features, NUM_DENSE)))
        self._feature_weights = 0.7 + 0.3 * weights[:num_features, 0]
        self._dense_weights = weights[:NUM_DENSE, 1].astype(np.float64)
        self._scales = (1.0, 1.0, 1.0)
        self._bias = 0.0
        self._dense_bias = 0.0

    def _parts(self, ids: Sequence[npt.NDArray[np.int64]], dense: npt.NDArray[np.float32]) -> _Parts:
        size = dense.shape[1]
        main = np.zeros(size, np.float32)
        factor_sum = np.zeros((size, FACTOR_RANK), np.float32)
        squares = np.zeros(size, np.float32)
        for key, weight, feature_ids in zip(self._keys, self._feature_weights, ids, strict=True):
            words = _hash_ids(key, feature_ids)
            main += weight * words[:, 0]
            factors = words[:, 1:]
            factor_sum += factors
            squares += np.einsum("br,br->b", factors, factors)
        pairs = (np.einsum("br,br->b", factor_sum, factor_sum) - squares) / 2
        return _Parts(main.astype(np.float64), pairs.astype(np.float64), self._dense_weights @ dense)

    def fit(
        self, ids: Sequence[npt.NDArray[np.int64]], dense: npt.NDArray[np.float32], click_rate: float
    ) -> None:
        """Set the scales and the bias on pilot rows: ids F arrays [B], standardised dense float32 [13, B]."""
        parts = self._parts(ids, dense)
        self._scales = (
            MAIN_SCALE / max(float(parts.main.std()), 1e-6),
            PAIRS_SCALE / max(float(parts.pairs.std()), 1e-6),
            DENSE_SCALE / max(float(parts.dense.std()), 1e-6),
        )
        self._bias = 0.0
        logit = self._logit(parts)
        low, high = -50.0 - float(logit.max()), 50.0 - float(logit.min())
        for _ in range(80):
            middle = (low + high) / 2
            too_high = float(sigmoid(logit + middle).mean()) > click_rate
            low, high = (low, middle) if too_high else (middle, high)
        self._bias = (low + high) / 2

    def _logit(self, parts: _Parts) -> npt.NDArray[np.float64]:
        main, pairs, dense = self._scales
        result: npt.NDArray[np.float64] = (
            self._bias + main * parts.main + pairs * parts.pairs + dense * parts.dense
        )
        return result

    def probability(
        self, ids: Sequence[npt.NDArray[np.int64]], dense: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """P(click) [B], and the score in (0, 1) [B] of the best model that sees the dense features only."""
        parts = self._parts(ids, dense)
        return sigmoid(self._logit(parts)), sigmoid(self._scales[2] * parts.dense)


def sigmoid(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """1 / (1 + e^-x), for the moderate x of a teacher's logit."""
    result: npt.NDArray[np.float64] = 1.0 / (1.0 + np.exp(-x))
    return result


class BestScore:
    """AUC and logloss of a known probability against its labels, in bounded memory.

    Scores are counted in 2^20 equal bins of [0, 1]; a pair of a click and a non-click in one bin counts one
    half.
    """

    _BINS = 1 << 20

    def __init__(self) -> None:
        self._counts = np.zeros((2, self._BINS), np.int64)
        self._logloss_sum = 0.0

    def add(self, probability: npt.NDArray[np.float64], clicked: npt.NDArray[np.bool_]) -> None:
        """Count rows: float64 [B] in (0, 1), bool [B]."""
        bins = np.minimum((probability * self._BINS).astype(np.int64), self._BINS - 1)
        np.add.at(self._counts[0], bins[~clicked], 1)
        np.add.at(self._counts[1], bins[clicked], 1)
        self._logloss_sum -= float(np.log(np.where(clicked, probability, 1.0 - probability)).sum())

    def auc(self) -> float | None:
        """Area under the ROC curve, None unless both classes were seen."""
        no_click, click = self._counts
        pairs = int(no_click.sum()) * int(click.sum())
        if pairs == 0:
            return None
        below = np.cumsum(no_click) - no_click
        return float((click * (below + no_click / 2)).sum() / pairs)

    def logloss(self) -> float | None:
        """Mean negative log-likelihood in nats, None without rows."""
        rows = int(self._counts.sum())
        return self._logloss_sum / rows if rows else None
