"""The sharding plan of least time: options chosen by the bound's multipliers, placed by LPT, then improved.

The slowest rank sets a step's time, as in torchrec's cost model. Candidates are the choices that
:mod:`recemb.planner.bound` finds for a range of longest shards and of storage kept free; each is placed, and
the best are improved by moving and exchanging shards of the slowest rank and by changing units' options. The
result is compared with the lower bound, so that every plan states how far from the best it can be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from recemb.planner.bound import Relaxation, Totals
from recemb.planner.improve import improve
from recemb.planner.layout import Cluster, Option, Unit, possible, prune
from recemb.planner.placement import Placement, by_both, by_storage, by_time, place

_TIMES = 24
_SHARES = (1.0, 0.98, 0.94, 0.88, 0.8)
_PARTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
# Parts of a rank's storage that the shards of a plan may take where larger ones do not pack.
_PIECES = (0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.12, 0.06, 0.03)
_IMPROVED = 4
# A plan this close to the bound is not searched further.
_CLOSE = 0.01


@dataclass(frozen=True, eq=False)
class Found:
    """A search's outcome.

    Attributes:
        placement: the best plan, or ``None`` when no plan was found that fits.
        bound: no plan is faster than this, ms; infinite when it is certain that none fits.
        options_before, options_after: how many options the search had before and after pruning.
        tried: how many choices were placed.
    """

    placement: Placement | None
    bound: float
    options_before: int
    options_after: int
    tried: int

    @property
    def gap(self) -> float:
        """How far above the bound the plan is, as a fraction: 0 is proven best."""
        if self.placement is None:
            return float("inf")
        return max(0.0, self.placement.cost / self.bound - 1) if self.bound > 0 else 0.0


def search(units: Sequence[Unit], cluster: Cluster, pruning: bool = True) -> Found:
    """The fastest plan found, and how close it must be to the fastest there is.

    Args:
        units: what is placed; each has an option at least.
        cluster: the ranks.
        pruning: leave dominated options out, which loses nothing; for comparison. Options with a shard that
            fits no empty rank are always left out.
    """
    before = sum(len(unit.options) for unit in units)
    units = _possible(units, cluster)
    if not all(unit.options for unit in units):
        return Found(None, np.inf, before, sum(len(unit.options) for unit in units), 0)
    units = [prune(unit) for unit in units] if pruning else units
    after = sum(len(unit.options) for unit in units)
    if not units:
        return Found(Placement(cluster, [], [], np.zeros(cluster.world_size), cluster.capacity), 0, 0, 0, 0)
    totals = Totals.of(units, cluster)
    bound = totals.lower_bound()
    if np.isinf(bound):
        return Found(None, bound, before, after, 0)
    tried = _Tried(units, cluster)
    tried.add(_by_longest_shard(totals, bound))
    for piece in _PIECES:
        if tried.least > bound * (1 + _CLOSE):
            tried.add(_by_longest_shard(totals, bound, piece))
    if not tried.placed:
        smallest = _smallest(units, cluster)
        tried.placed = [] if smallest is None else [smallest]
    best = tried.best()
    if best is not None and best.cost > bound * (1 + _CLOSE):
        tried.add(_by_time_everywhere(totals, bound, best.cost))
        best = tried.best()
        assert best is not None
        if best.cost > bound * (1 + _CLOSE):
            bound = totals.stronger_bound(bound, best.cost)
    return Found(best, bound, before, after, len(tried.seen))


def fits(units: Sequence[Unit], cluster: Cluster, thorough: bool = True) -> bool:
    """Whether :func:`search` finds a plan; much sooner, when it does.

    Args:
        units: as for ``search``; pruned ones give the same answer, sooner.
        cluster: the ranks.
        thorough: whether smaller pieces are tried too, as ``search`` does when nothing else fits. Without,
            ``False`` may be wrong, and takes a third of the time.
    """
    units = _possible(units, cluster)
    if not all(unit.options for unit in units):
        return False
    if not units:
        return True
    totals = Totals.of(units, cluster)
    bound = totals.lower_bound()
    if np.isinf(bound):
        return False
    tried = _Tried(units, cluster)
    if any(map(tried.places, _by_longest_shard(totals, bound))) or _smallest(units, cluster) is not None:
        return True
    pieces = _PIECES if thorough else ()
    return any(tried.places(each) for piece in pieces for each in _by_longest_shard(totals, bound, piece))


def hopeless(units: Sequence[Unit], cluster: Cluster) -> bool:
    """Whether it is certain, at little cost, that no plan fits; then none fits less storage either."""
    units = _possible(units, cluster)
    if not all(unit.options for unit in units):
        return True
    return bool(units) and Totals.of(units, cluster).too_large()


def _possible(units: Sequence[Unit], cluster: Cluster) -> list[Unit]:
    """The units without the options of which a shard fits no empty rank."""
    return [Unit(u.name, tuple(o for o in u.options if possible(o, cluster))) for u in units]


class _Tried:
    """Choices of one option per unit that were placed."""

    def __init__(self, units: Sequence[Unit], cluster: Cluster) -> None:
        self._units, self._cluster = units, cluster
        self.placed: list[Placement] = []
        self.seen: set[bytes] = set()

    def add(self, relaxations: Iterator[Relaxation]) -> None:
        """Place each choice that is new."""
        for relaxed in relaxations:
            self.places(relaxed)

    def places(self, relaxed: Relaxation) -> bool:
        """Whether the choice is new and finds room: by LPT, or with more weight on storage."""
        key = relaxed.choice.tobytes()
        if np.isinf(relaxed.mean) or key in self.seen:
            return False
        self.seen.add(key)
        chosen = [unit.options[k] for unit, k in zip(self._units, relaxed.choice, strict=True)]
        mean = max(sum(float(option.ms.sum()) for option in chosen) / self._cluster.world_size, 1e-9)
        orders = (by_time, by_both(self._cluster, mean), by_storage(self._cluster))
        tries = (place(chosen, self._cluster, order) for order in orders)
        found = next((placed for placed in tries if placed is not None), None)
        if found is not None:
            self.placed.append(found)
        return found is not None

    @property
    def least(self) -> float:
        """Time of the fastest plan so far, ms; infinite without one."""
        return min((placed.cost for placed in self.placed), default=np.inf)

    def best(self) -> Placement | None:
        """The best of the few fastest ones, each improved."""
        self.placed.sort(key=lambda placement: placement.cost)
        self.placed[:_IMPROVED] = [improve(found, self._units) for found in self.placed[:_IMPROVED]]
        return min(self.placed, key=lambda placement: placement.cost, default=None)


def _by_longest_shard(totals: Totals, bound: float, piece: float = np.inf) -> Iterator[Relaxation]:
    longest = max(totals.range[1], bound)
    shares = _SHARES if len(totals.capacity) else (1.0,)
    # With smaller pieces to pack, fewer times are tried.
    times = _TIMES if piece == np.inf else _TIMES // 4
    for time in np.geomspace(max(bound, 1e-9), max(longest, 1e-9), times):
        for share in shares:
            yield totals.relaxed(float(time), share=share, piece=piece)


def _by_time_everywhere(totals: Totals, bound: float, cost: float) -> Iterator[Relaxation]:
    for time in np.linspace(bound, cost, _TIMES // 2):
        for part in _PARTS:
            yield totals.relaxed(float(time), (part * float(time), part * float(time)))


def _smallest(units: Sequence[Unit], cluster: Cluster) -> Placement | None:
    """A plan that fits when hardly any does: the same search for the least full of fullest ranks."""
    capacity = np.maximum(cluster.capacity.max(axis=0), 1)

    def filling(option: Option) -> Option:
        return Option(option, option.spread, (option.storage / capacity).max(axis=1), option.storage)

    twins = [Unit(unit.name, tuple(filling(option) for option in unit.options)) for unit in units]
    roomy = Cluster(cluster.local_size, np.full_like(cluster.capacity, 2**62))
    twins = [prune(unit) for unit in twins]
    totals = Totals.of(twins, roomy)
    tried = _Tried(twins, roomy)
    tried.add(_by_longest_shard(totals, totals.lower_bound()))
    best = tried.best()
    assert best is not None  # there is room for everything
    originals = [option.key for option in best.options]
    free = cluster.capacity.copy()
    loads = np.zeros(cluster.world_size)
    for option, ranks in zip(originals, best.ranks, strict=True):
        assert isinstance(option, Option)
        np.add.at(loads, ranks, option.ms)
        np.subtract.at(free, ranks, option.storage)
    if (free < 0).any():
        return None
    return Placement(cluster, [o for o in originals if isinstance(o, Option)], best.ranks, loads, free)
