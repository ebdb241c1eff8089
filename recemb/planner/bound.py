"""A time below which no plan can be, and the choices that the bound's multipliers suggest.

A plan of time T whose shards on every rank (row-wise, data-parallel) take U of it has no other shard longer
than T - U. Let every unit take only such options, and mix them in fractions. The mean time of a rank is then
at least

    A(T, U) = max over l >= 0 of (sum over units of min over options of (ms + l . use) - l . C) / W

with an option's ms and use summed over its shards, C the cluster's bytes, and U for the time on every rank:
the dual of a linear programme (a multiple-choice knapsack), solved by bisection on each multiplier. A plan
exists only if A(T, U) <= T for its U. A falls as T grows, so the smallest T that some U allows is a lower
bound; U is covered by intervals. When neither storage nor options bind it is max(total / ranks, longest
shard).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import numpy.typing as npt

from recemb.planner.layout import Cluster, Floats, Spread, Unit

# Of a bisection of times, and of a multiplier: to a part in 100,000 of it.
_STEPS, _PRICE_STEPS = 36, 23
_ROUNDS = 2
_INTERVALS = 12
_PARTS = 33


@dataclass(frozen=True, eq=False)
class Relaxation:
    """What the multipliers found.

    Attributes:
        mean: A: the mean time of a rank is at least this, ms; infinite when no mixture is allowed.
        choice: [n] the option each unit takes at multipliers just large enough to keep to the storage.
    """

    mean: float
    choice: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Totals:
    """The options of all units as arrays, padded with options of infinite time.

    Attributes:
        longest: [n, K] ms of an option's longest shard.
        ms: [n, K] of all its shards.
        everywhere: [n, K] whether it has a shard on every rank.
        piece: [n, K] the largest part of a rank's storage, of any kind, that one of its shards takes.
        use: [n, K, R + 1] bytes of all its shards, of the resources that can bind, and last its time on
            every rank.
        capacity: [R] bytes of the cluster.
    """

    longest: Floats
    ms: Floats
    everywhere: npt.NDArray[np.bool_]
    piece: Floats
    use: Floats
    capacity: Floats
    world_size: int

    @classmethod
    def of(cls, units: Sequence[Unit], cluster: Cluster) -> Totals:
        most = max(len(unit.options) for unit in units)
        shape = len(units), most
        longest, ms = np.full(shape, np.inf), np.full(shape, np.inf)
        everywhere, piece = np.zeros(shape, np.bool_), np.full(shape, np.inf)
        largest = np.maximum(cluster.capacity.max(axis=0), 1)
        use = np.zeros((*shape, cluster.capacity.shape[1] + 1))
        for i, unit in enumerate(units):
            for k, option in enumerate(unit.options):
                longest[i, k], ms[i, k] = option.ms.max(), option.ms.sum()
                everywhere[i, k] = option.spread is Spread.EVERY
                piece[i, k] = (option.storage.max(axis=0) / largest).max()
                use[i, k, :-1] = option.storage.sum(axis=0)
                use[i, k, -1] = option.ms.min() if everywhere[i, k] else 0
        capacity = cluster.capacity.sum(axis=0, dtype=np.float64)
        # A resource that even the largest options leave free needs no multiplier.
        binds = use[:, :, :-1].max(axis=1).sum(axis=0) > capacity
        kept = np.append(binds, True)
        return cls(longest, ms, everywhere, piece, use[:, :, kept], capacity[binds], cluster.world_size)

    @property
    def range(self) -> tuple[float, float]:
        """The longest shard of a plan is at least the first and at most the second, ms."""
        return float(self.longest.min(axis=1).max()), float(self.longest[np.isfinite(self.longest)].max())

    def relaxed(
        self,
        time: float,
        uniform: tuple[float, float] | None = None,
        share: float = 1,
        piece: float = np.inf,
    ) -> Relaxation:
        """The relaxation of plans of ``time``.

        Args:
            time: T, ms.
            uniform: the interval that U is in, ms; any when ``None``.
            share: of the storage that may be used.
            piece: the largest part of a rank's storage that a shard may take, but for units that have only
                larger ones.
        """
        slack = 1 + 1e-9
        limit = time * slack if uniform is None else (time - uniform[0]) * slack
        allowed = np.where(self.everywhere, time * slack, limit) >= self.longest
        ms = np.where(allowed, self.ms, np.inf)
        if piece < np.inf:
            smallest = np.where(allowed, self.piece, np.inf).min(axis=1, keepdims=True)
            ms = np.where(self.piece <= np.maximum(piece, smallest), ms, np.inf)
        if np.isinf(ms.min(axis=1)).any():
            return Relaxation(np.inf, np.zeros(len(ms), np.int64))
        if uniform is None:
            return _solve(ms, self.use[:, :, :-1], share * self.capacity, self.world_size)
        return _solve(ms, self.use, np.append(share * self.capacity, uniform[1]), self.world_size)

    def lower_bound(self) -> float:
        """No plan is faster, ms; infinite when storage suffices for none. U is left free."""
        if self.too_large():
            return np.inf
        low, high = self.range
        at_most = self.relaxed(high).mean
        if np.isinf(at_most) or at_most >= high:
            return max(at_most, low)
        return _bisect(low, high, lambda time: self.relaxed(time).mean <= time)

    def too_large(self) -> bool:
        """Whether the units certainly need more storage than there is, however they divide it.

        For parts w >= 0 that add up to 1, every plan has sum over resources of w * used / capacity <= 1.
        """
        used = np.where(np.isfinite(self.ms)[:, :, None], self.use[:, :, :-1], 1e30)
        used = used / np.maximum(self.capacity, 1e-12)
        count = len(self.capacity)
        pairs = combinations(range(count), 2) if count > 1 else [(0, 0)] * count
        return any(
            (part * used[:, :, a] + (1 - part) * used[:, :, b]).min(axis=1).sum() > 1 + 1e-9
            for a, b in pairs
            for part in np.linspace(0, 1, _PARTS)
        )

    def stronger_bound(self, bound: float, cost: float) -> float:
        """The bound with U in intervals, between ``bound`` and the ``cost`` of a plan."""

        def possible(time: float) -> bool:
            edges = np.linspace(0, time, _INTERVALS + 1)
            return any(
                self.relaxed(time, (float(low), float(high))).mean <= time for low, high in pairwise(edges)
            )

        return _bisect(bound, cost, possible, steps=12)


def _bisect(low: float, high: float, possible: Callable[[float], bool], steps: int = _STEPS) -> float:
    """A time below which all are impossible, given that ``possible`` turns true once; ``low`` at least."""
    if possible(low):
        return low
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if possible(middle) else (middle, high)
    return low


def _solve(ms: Floats, use: Floats, capacity: Floats, world_size: int) -> Relaxation:
    """Coordinate-wise bisection of the dual, which is concave; any multipliers give a valid bound."""
    if (np.where(np.isfinite(ms)[:, :, None], use, np.inf).min(axis=1).sum(axis=0) > capacity).any():
        return Relaxation(np.inf, np.zeros(len(ms), np.int64))
    rows = np.arange(len(ms))
    multipliers = np.zeros(len(capacity))
    # A multiplier's own scale, so that one range of exponents serves all.
    scale = ms[np.isfinite(ms)].max() / np.maximum(use.max(axis=(0, 1)), 1e-12)

    # One product for all options: numpy takes that of three dimensions unit by unit.
    flat = use.reshape(ms.size, len(capacity))

    def choose(at: Floats) -> npt.NDArray[np.int64]:
        return np.asarray((ms + (flat @ at).reshape(ms.shape)).argmin(axis=1))

    def value(at: Floats, choice: npt.NDArray[np.int64], used: Floats) -> float:
        return float(ms[rows, choice].sum() + (used - capacity) @ at) / world_size

    choice = choose(multipliers)
    used = use[rows, choice].sum(axis=0)
    best = value(multipliers, choice, used)
    if (used <= capacity).all():
        return Relaxation(best, choice)
    for _ in range(_ROUNDS if len(capacity) > 1 else 1):
        for r in range(len(capacity)):
            trial = multipliers.copy()
            trial[r] = 0
            if use[rows, choose(trial), r].sum() <= capacity[r]:
                multipliers = trial
                continue
            low, high = -40.0, 40.0
            for _ in range(_PRICE_STEPS):
                middle = (low + high) / 2
                trial[r] = 2.0**middle * scale[r]
                choice = choose(trial)
                used = use[rows, choice].sum(axis=0)
                best = max(best, value(trial, choice, used))
                within = used[r] <= capacity[r]
                low, high = (low, middle) if within else (middle, high)
            multipliers[r] = 2.0**high * scale[r]
    return Relaxation(best, choose(multipliers))
