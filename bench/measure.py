"""Turns, percentiles and ratios."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.ids import Batch

Seconds = npt.NDArray[np.float64]
Key = tuple[str, str]
_WARM_UP = 3


@dataclass(frozen=True)
class Runner:
    """One case on one path.

    Args:
        step: what is timed.
        batches: its inputs, one a round.
        first: the batch of round 0. Paths that share tables start at different batches, so that none finds
            the rows in cache that another has just looked up.
    """

    step: Callable[[Batch], object]
    batches: Sequence[Batch]
    first: int = 0

    def warm_up(self) -> float:
        """Compile kernels and allocate workspaces, on batches that come up last; seconds of the best step."""
        return min(self.run(-1 - k) for k in range(_WARM_UP))

    def run(self, turn: int) -> float:
        """Seconds of one step."""
        batch = self.batches[(self.first + turn) % len(self.batches)]
        started = time.perf_counter()
        self.step(batch)
        return time.perf_counter() - started


@dataclass(frozen=True)
class Percentiles:
    """Step times in microseconds."""

    p20: float
    p50: float
    p80: float


def take_turns(
    runners: Mapping[Key, Runner],
    rounds: int,
    slow: float = math.inf,
    each_round: Callable[[], object] | None = None,
) -> dict[Key, Seconds]:
    """Time every runner once a round, so that a machine that slows down slows all of them.

    Each round has an order of its own, so that no case always follows the one that empties the caches.

    Args:
        runners: what takes turns.
        rounds: from 1.
        slow: seconds; a longer step takes part in every 2nd, 4th or 8th round only, so as to take about as
            much time as a step of this length. Any two steps meet at least every 8th round.
        each_round: called before the steps of a round.

    Returns:
        [rounds] seconds of each runner, NaN in the rounds without it.
    """
    every = {key: _every(runner.warm_up(), slow) for key, runner in runners.items()}
    times = {key: np.full(rounds, np.nan) for key in runners}
    generator = np.random.default_rng(0)
    keys = list(runners)
    for turn in range(rounds):
        if each_round is not None:
            each_round()
        for k in generator.permutation(len(keys)):
            if turn % every[keys[k]] == 0:
                # Its own count of turns: every 8th would meet two of sixteen batches.
                times[keys[k]][turn] = runners[keys[k]].run(turn // every[keys[k]])
    return times


def _every(seconds: float, slow: float) -> int:
    """A step of so many seconds takes part in every k-th round: 1, 2, 4 or 8."""
    return next((k for k in (1, 2, 4) if seconds <= k * slow), 8)


def percentiles(times: Seconds) -> Percentiles:
    """P20, P50 and P80 of the rounds that it took part in."""
    return Percentiles(*(float(p) for p in np.nanpercentile(times, [20, 50, 80]) * 1e6))


def ratio(times: Seconds, baseline: Seconds) -> float:
    """Median of the round-by-round ratios: a round in which the machine was slow cancels out."""
    return float(np.nanmedian(times / baseline))
