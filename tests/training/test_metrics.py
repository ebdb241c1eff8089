"""Metrics against exact oracles, and the laws of merging."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.errors import DataError, NonFiniteError
from recemb.training.metrics import LOGIT_LIMIT, NUM_BINS, ClickMetrics

Array = npt.NDArray[np.float64]


def exact_auc(logits: Array, labels: Array) -> float:
    """Mann and Whitney's statistic from ranks, ties sharing their mean rank: O(n log n), exact."""
    order = np.argsort(logits, kind="stable")
    ranked = logits[order]
    ranks = np.empty(len(logits))
    start = 0
    for end in range(1, len(logits) + 1):
        if end == len(logits) or ranked[end] != ranked[start]:
            ranks[order[start:end]] = (start + end + 1) / 2
            start = end
    positives = int(labels.sum())
    negatives = len(labels) - positives
    return (ranks[labels == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives)


def metrics_of(logits: Array, labels: Array) -> ClickMetrics:
    metrics = ClickMetrics()
    metrics.update(logits, labels)
    return metrics


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
def test_auc_within_its_own_bound(scale: float) -> None:
    rng = np.random.default_rng(5)
    logits = rng.normal(-1, scale, 20_000)
    labels = (rng.random(20_000) < 1 / (1 + np.exp(-logits))).astype(np.float64)
    values = metrics_of(logits, labels).compute()
    assert abs(values.auc - exact_auc(logits, labels)) <= values.auc_error_bound + 1e-12
    # A pair is tied when it falls within one bin; for these logits that is rare.
    assert values.auc_error_bound <= NUM_BINS**-1 * 2 * LOGIT_LIMIT / scale


def test_auc_exact_when_bins_are_not_shared() -> None:
    rng = np.random.default_rng(0)
    width = 2 * LOGIT_LIMIT / NUM_BINS
    logits = (rng.permutation(2000) - 1000) * (3 * width)
    labels = rng.integers(0, 2, 2000).astype(np.float64)
    values = metrics_of(logits, labels).compute()
    assert values.auc_error_bound == 0
    assert values.auc == pytest.approx(exact_auc(logits, labels), abs=1e-15)


def test_auc_counts_ties_half() -> None:
    logits = np.array([0.0, 0.0, 1.0, 1.0, 2.0])
    labels = np.array([0.0, 1.0, 0.0, 1.0, 1.0])
    # Of 6 pairs, 3 are in order, 1 is not, and the 2 with equal scores count half.
    assert metrics_of(logits, labels).compute().auc == pytest.approx(4 / 6) == exact_auc(logits, labels)


def test_logloss_ne_and_calibration_by_hand() -> None:
    logits = np.array([-2.0, 0.0, 3.0, -1.0])
    labels = np.array([0.0, 1.0, 1.0, 0.0])
    p = 1 / (1 + np.exp(-logits))
    logloss = -float(np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p)))
    values = metrics_of(logits, labels).compute()
    assert values.logloss == pytest.approx(logloss, abs=1e-11)
    assert values.ne == pytest.approx(logloss / math.log(2), abs=1e-11)
    assert values.calibration == pytest.approx(float(p.sum()) / 2, abs=1e-11)


def test_logloss_of_extreme_logits() -> None:
    values = metrics_of(np.array([800.0, -800.0]), np.array([0.0, 0.0])).compute()
    assert values.logloss == pytest.approx(400.0)
    assert values.auc != values.auc  # one class: undefined
    assert values.ne != values.ne
    tiny = metrics_of(np.array([40.0]), np.array([1.0])).compute()
    assert tiny.logloss == pytest.approx(math.exp(-40), abs=2**-40)


def test_base_rate_prediction_has_ne_one() -> None:
    labels = np.array([1.0] * 3 + [0.0] * 7)
    values = metrics_of(np.full(10, math.log(0.3 / 0.7)), labels).compute()
    assert values.ne == pytest.approx(1.0, abs=1e-10)
    assert values.calibration == pytest.approx(1.0, abs=1e-10)
    assert values.auc == 0.5


samples = st.lists(
    st.tuples(st.floats(-50, 50, allow_nan=False, width=32), st.booleans()), min_size=0, max_size=40
)


def accumulate(part: list[tuple[float, bool]]) -> ClickMetrics:
    return metrics_of(np.array([x for x, _ in part]), np.array([float(y) for _, y in part]))


def state(metrics: ClickMetrics) -> tuple[object, ...]:
    values = metrics.compute()
    numbers = (values.auc, values.auc_error_bound, values.logloss, values.ne, values.calibration)
    return (values.num_samples, *(None if math.isnan(number) else number for number in numbers))


@settings(derandomize=True, deadline=None, max_examples=40)
@given(samples, samples, samples)
def test_merging_is_associative_order_free_and_equals_one_pass(
    a: list[tuple[float, bool]], b: list[tuple[float, bool]], c: list[tuple[float, bool]]
) -> None:
    x, y, z = accumulate(a), accumulate(b), accumulate(c)
    expected = state(accumulate([*a, *b, *c]))
    assert state(x.merge(y).merge(z)) == expected
    assert state(x.merge(y.merge(z))) == expected
    assert state(z.merge(x).merge(y)) == expected
    one = ClickMetrics()
    for part in (c, a, b):
        one.update(np.array([v for v, _ in part]), np.array([float(label) for _, label in part]))
    assert state(one) == expected


def test_merge_leaves_its_arguments_alone() -> None:
    a, b = accumulate([(0.0, True), (1.0, False)]), accumulate([(2.0, True)])
    before = state(a), state(b)
    merged = a.merge(b)
    merged.update(np.array([5.0]), np.array([0.0]))
    assert (state(a), state(b)) == before
    only = ClickMetrics().merge(a)
    only.update(np.array([5.0]), np.array([0.0]))
    assert state(a) == before[0]


def test_bad_samples_are_refused_whole() -> None:
    metrics = accumulate([(0.5, True), (0.1, False)])
    before = state(metrics)
    with pytest.raises(NonFiniteError, match="logit nan at position 1"):
        metrics.update(np.array([0.0, math.nan]), np.array([0.0, 1.0]))
    with pytest.raises(DataError, match=r"label 2\.0 at position 0"):
        metrics.update(np.array([0.0]), np.array([2.0]))
    with pytest.raises(DataError, match="2 logits but 1 labels"):
        metrics.update(np.array([0.0, 1.0]), np.array([1.0]))
    assert state(metrics) == before


def test_empty() -> None:
    assert state(ClickMetrics()) == (0, None, None, None, None, None)
