"""Ratios and percentiles against numbers worked out by hand, and whose turn it is."""

from __future__ import annotations

import numpy as np
import pytest

from bench.measure import Key, Percentiles, Runner, percentiles, ratio, take_turns


def test_the_ratio_is_the_median_of_the_rounds_not_the_ratio_of_the_medians() -> None:
    # The machine was ten times slower in rounds 2 and 3: ratios 2, 4, 3.
    times, baseline = np.array([2.0, 40.0, 30.0]), np.array([1.0, 10.0, 10.0])
    assert ratio(times, baseline) == 3.0
    assert np.median(times) / np.median(baseline) == 3.0
    times, baseline = np.array([2.0, 40.0, 6.0]), np.array([1.0, 10.0, 10.0])
    assert ratio(times, baseline) == 2.0
    assert np.median(times) / np.median(baseline) == 0.6


def test_percentiles_are_microseconds() -> None:
    times = np.array([1e-6, 2e-6, 3e-6, 4e-6, 5e-6, 6e-6])
    found = percentiles(times)
    assert (found.p20, found.p50, found.p80) == pytest.approx((2.0, 3.5, 5.0))
    assert isinstance(found, Percentiles)


def test_every_case_runs_once_a_round_on_the_batch_of_the_round() -> None:
    calls: list[tuple[str, object]] = []
    batches = list(range(8))
    runners: dict[Key, Runner] = {
        (name, "op"): Runner(lambda batch, name=name: calls.append((name, batch)), batches, first)  # type: ignore[misc,arg-type]
        for name, first in (("a", 0), ("b", 4), ("c", 0))
    }
    times = take_turns(runners, 6)
    assert {key: len(seconds) for key, seconds in times.items()} == dict.fromkeys(runners, 6)
    rounds = [calls[k : k + 3] for k in range(len(calls) - 18, len(calls), 3)]
    for turn, calls_of_round in enumerate(rounds):
        assert sorted(calls_of_round) == [("a", turn), ("b", turn + 4 if turn < 4 else turn - 4), ("c", turn)]
    orders = {tuple(name for name, _ in calls_of_round) for calls_of_round in rounds}
    assert len(orders) > 1, "a fixed order lets one case always follow the same neighbour"


class _Slow(Runner):
    """A runner that says how long its steps take."""

    def warm_up(self) -> float:
        return self.first / 100


def test_slow_steps_take_part_in_fewer_rounds_all_of_them_the_fast_ones_too() -> None:
    runners: dict[Key, Runner] = {
        (str(hundredths), "op"): _Slow(lambda batch: None, [1, 2], hundredths)  # type: ignore[list-item]
        for hundredths in (0, 10, 20, 40, 1000)
    }
    times = take_turns(runners, 17, slow=0.1)
    rounds = {key[0]: np.flatnonzero(np.isfinite(found)).tolist() for key, found in times.items()}
    assert rounds == {
        "0": list(range(17)), "10": list(range(17)), "20": list(range(0, 17, 2)),
        "40": list(range(0, 17, 4)), "1000": [0, 8, 16],
    }  # fmt: skip
    assert ratio(times["1000", "op"], times["40", "op"]) > 0
    assert percentiles(times["1000", "op"]).p50 > 0
    alone = np.array([np.nan, 2.0, np.nan, 8.0, np.nan])
    assert ratio(alone, np.array([1.0, 1.0, 9.0, 2.0, 9.0])) == 3.0


def test_what_is_called_each_round_comes_before_its_steps() -> None:
    calls: list[str] = []
    runners: dict[Key, Runner] = {("a", "op"): Runner(lambda batch: calls.append("step"), [1, 2])}  # type: ignore[list-item]
    take_turns(runners, 4, each_round=lambda: calls.append("round"))
    assert calls[3:] == ["round", "step"] * 4


def test_warm_up_leaves_the_first_rounds_batches_cold() -> None:
    seen: list[object] = []
    Runner(seen.append, list(range(10))).warm_up()  # type: ignore[arg-type]
    assert seen == [9, 8, 7]
