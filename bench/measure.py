"""Turns, percentiles and ratios."""

from __future__ import annotations

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

    def warm_up(self) -> None:
        """Compile kernels and allocate workspaces, on batches that come up last."""
        for k in range(_WARM_UP):
            self.run(-1 - k)

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


def take_turns(runners: Mapping[Key, Runner], rounds: int) -> dict[Key, Seconds]:
    """Time every runner once a round, so that a machine that slows down slows all of them.

    Each round has an order of its own, so that no case always follows the one that empties the caches.

    Returns:
        [rounds] seconds of each runner.
    """
    for runner in runners.values():
        runner.warm_up()
    times = {key: np.empty(rounds) for key in runners}
    generator = np.random.default_rng(0)
    keys = list(runners)
    for turn in range(rounds):
        for k in generator.permutation(len(keys)):
            times[keys[k]][turn] = runners[keys[k]].run(turn)
    return times


def percentiles(times: Seconds) -> Percentiles:
    """P20, P50 and P80."""
    return Percentiles(*(float(p) for p in np.percentile(times, [20, 50, 80]) * 1e6))


def ratio(times: Seconds, baseline: Seconds) -> float:
    """Median of the round-by-round ratios: a round in which the machine was slow cancels out."""
    return float(np.median(times / baseline))
