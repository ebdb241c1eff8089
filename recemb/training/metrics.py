"""Click-through metrics that merge exactly: AUC, logloss, normalised entropy, calibration.

Batches may be split over processes and merged in any order: every sum is an integer, so the result is
identical bit for bit to a single pass.

AUC is read from two histograms (clicks, non-clicks) over the logit, whose bins are ``2 * LOGIT_LIMIT /
NUM_BINS`` = 2^-13 wide; logits beyond the limit share the outer bins. Pairs within one bin count as ties,
so the error is at most half the share of such pairs, sum_b P_b N_b / (2 P N), which ``auc_error_bound``
reports for the data at hand; it is 0 when no bin holds both a click and a non-click.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recemb.errors import DataError, NonFiniteError

NUM_BINS = 1 << 18
LOGIT_LIMIT = 16.0
# Losses are summed as whole nats plus a fraction in units of 2^-40: exact integers, off by <= 2^-41 a sample.
_FRACTION = 1 << 40
# Of 32 bits: 2^96 holds the loss of 2^36 samples at LOSS_LIMIT each.
_LIMBS = 3
# A sample's loss is capped here (nats) so that its whole part cannot overflow the int64 sum of a batch.
LOSS_LIMIT = float(1 << 20)


@dataclass(frozen=True)
class MetricValues:
    """What :meth:`ClickMetrics.compute` returns; ``nan`` where the data does not define a value.

    ``auc`` needs both classes; ``logloss`` is in nats a sample; ``ne`` is logloss over the entropy of the
    base rate (He et al., ADKDD 2014); ``calibration`` is mean prediction over mean label.
    """

    auc: float
    auc_error_bound: float
    logloss: float
    ne: float
    calibration: float
    num_samples: int


class ClickMetrics:
    """Accumulates logits and labels; ``merge`` adds another accumulator's samples."""

    def __init__(self) -> None:
        # [2, NUM_BINS]: non-clicks, clicks. Allocated at the first update: many accumulators stay empty.
        self._histograms: npt.NDArray[np.int64] | None = None
        self._loss = 0
        self._prediction = 0
        self._clicks = 0
        self.num_samples = 0

    def update(self, logits: npt.NDArray[np.floating], labels: npt.NDArray[np.floating]) -> None:
        """Add samples.

        Args:
            logits: [B], any float type, finite.
            labels: [B], 0 or 1.

        Raises:
            NonFiniteError: a logit is NaN or infinite; nothing is added.
            DataError: the shapes differ or a label is neither 0 nor 1; nothing is added.
        """
        x = np.asarray(logits, dtype=np.float64).reshape(-1)
        y = np.asarray(labels, dtype=np.float64).reshape(-1)
        if x.shape != y.shape:
            raise DataError(f"metrics: {x.size} logits but {y.size} labels")
        if not np.isfinite(x).all():
            first = int(np.flatnonzero(~np.isfinite(x))[0])
            raise NonFiniteError(f"metrics: logit {x[first]} at position {first} is not finite")
        clicked = y == 1
        if not (clicked | (y == 0)).all():
            first = int(np.flatnonzero(~(clicked | (y == 0)))[0])
            raise DataError(f"metrics: label {y[first]} at position {first} must be 0 or 1")
        bins = np.clip((x + LOGIT_LIMIT) * (NUM_BINS / (2 * LOGIT_LIMIT)), 0, NUM_BINS - 1).astype(np.int64)
        if self._histograms is None:
            self._histograms = np.zeros((2, NUM_BINS), dtype=np.int64)
        np.add.at(self._histograms, (clicked.astype(np.int64), bins), 1)
        # log(1 + exp(x)) - x y, written so that neither exp overflows nor two large numbers cancel.
        decay = np.exp(-np.abs(x))
        loss = np.maximum(np.where(clicked, -x, x), 0) + np.log1p(decay)
        self._loss += _exact_sum(np.minimum(loss, LOSS_LIMIT))
        self._prediction += _exact_sum(np.where(x >= 0, 1, decay) / (1 + decay))
        self._clicks += int(clicked.sum())
        self.num_samples += x.size

    def merge(self, other: ClickMetrics) -> ClickMetrics:
        """A new accumulator with both sets of samples; associative and commutative, bit for bit."""
        merged = ClickMetrics()
        parts = [part._histograms for part in (self, other) if part._histograms is not None]
        if parts:
            merged._histograms = np.add(parts[0], parts[1]) if len(parts) == 2 else parts[0].copy()
        for name in ("_loss", "_prediction", "_clicks", "num_samples"):
            setattr(merged, name, getattr(self, name) + getattr(other, name))
        return merged

    def counts(self) -> npt.NDArray[np.int64]:
        """Everything accumulated, as int64 [2 * NUM_BINS + 12]; the sum of two such arrays is their merge.

        Sums that may outgrow an int64 are in it as limbs of 32 bits, so that up to 2^31 arrays add up.
        """
        sums = (self._loss, self._prediction, self._clicks, self.num_samples)
        limbs = [(value >> (32 * limb)) & 0xFFFFFFFF for value in sums for limb in range(_LIMBS)]
        histograms = self._histograms
        flat = np.zeros(2 * NUM_BINS, np.int64) if histograms is None else histograms.reshape(-1)
        return np.concatenate([flat, np.array(limbs, dtype=np.int64)])

    @classmethod
    def from_counts(cls, counts: npt.NDArray[np.int64]) -> ClickMetrics:
        """The accumulator whose :meth:`counts` are ``counts``, or a sum of such."""
        made = cls()
        limbs = [int(limb) for limb in counts[2 * NUM_BINS :]]
        sums = [
            sum(limb << (32 * place) for place, limb in enumerate(limbs[start : start + _LIMBS]))
            for start in range(0, len(limbs), _LIMBS)
        ]
        made._loss, made._prediction, made._clicks, made.num_samples = sums
        if made.num_samples:
            made._histograms = counts[: 2 * NUM_BINS].reshape(2, NUM_BINS).copy()
        return made

    def compute(self) -> MetricValues:
        """The metrics of all samples so far; every value is ``nan`` when there is none."""
        if self._histograms is None or self.num_samples == 0:
            return MetricValues(*(math.nan,) * 5, num_samples=0)
        auc, bound = _auc(self._histograms)
        logloss = self._loss / (_FRACTION * self.num_samples)
        rate = self._clicks / self.num_samples
        entropy = -sum(p * math.log(p) for p in (rate, 1 - rate) if p > 0)
        return MetricValues(
            auc=auc,
            auc_error_bound=bound,
            logloss=logloss,
            ne=logloss / entropy if entropy > 0 else math.nan,
            calibration=self._prediction / (_FRACTION * self._clicks) if self._clicks else math.nan,
            num_samples=self.num_samples,
        )


def _exact_sum(values: npt.NDArray[np.float64]) -> int:
    whole = np.floor(values)
    fraction = np.rint((values - whole) * _FRACTION)
    total = 0
    # int64 holds the fractions of 2^22 samples.
    for start in range(0, values.size, 1 << 22):
        part = slice(start, start + (1 << 22))
        total += int(whole[part].astype(np.int64).sum()) * _FRACTION
        total += int(fraction[part].astype(np.int64).sum())
    return total


def _auc(histograms: npt.NDArray[np.int64]) -> tuple[float, float]:
    used = histograms.any(axis=0)
    negatives, positives = histograms[:, used].astype(object)
    num_negatives, num_positives = int(sum(negatives)), int(sum(positives))
    if num_negatives == 0 or num_positives == 0:
        return math.nan, math.nan
    # Twice the number of (click, non-click) pairs in order, ties counted once: exact in Python ints.
    below = np.cumsum(negatives) - negatives
    twice_right = int((positives * (2 * below + negatives)).sum())
    tied = int((positives * negatives).sum())
    pairs = num_negatives * num_positives
    return twice_right / (2 * pairs), tied / (2 * pairs)
