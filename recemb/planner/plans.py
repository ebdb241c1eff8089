"""Plans that fit, found one after the other, and how little storage will do.

Choices of one option per unit come from :mod:`recemb.planner.bound`, for a range of longest shards, of
storage kept free and of time on every rank; each is placed by LPT, and the best are improved.

A plan found within some storage must be found within more, too. So whether there is one is decided by plans
that do not depend on how much there is: the same search makes them, with bytes in place of time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from recemb.planner.bound import Relaxation, Totals
from recemb.planner.improve import improve
from recemb.planner.layout import Cluster, Option, Spread, Unit, possible, prune
from recemb.planner.placement import Placement, by_both, by_storage, by_time, place

_TIMES = 24
_SHARES = (1.0, 0.98, 0.94, 0.88, 0.8)
_PARTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
# Parts of a rank's storage that the shards of a plan may take where larger ones do not pack.
_PIECES = (0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.12, 0.06, 0.03)
_IMPROVED = 4
# A plan this close to the bound is not searched further.
CLOSE = 0.01


class Plans:
    """Plans of some units, to be iterated over; each fits.

    Args:
        units: what is placed; each has an option at least.
        cluster: the ranks.
        thorough: whether smaller pieces are tried in the end. Without, one that hardly fits may be missed.

    Attributes:
        units: without the options of which a shard fits no empty rank.
        tried: how many choices were placed.
    """

    def __init__(self, units: Sequence[Unit], cluster: Cluster, thorough: bool = True) -> None:
        self.units = [Unit(u.name, tuple(o for o in u.options if possible(o, cluster))) for u in units]
        self._given, self._cluster, self._thorough = units, cluster, thorough
        self._seen: set[bytes] = set()
        self._raw: list[Placement] = []
        self._improved: list[Placement] = []

    @property
    def tried(self) -> int:
        return len(self._seen)

    @cached_property
    def totals(self) -> Totals:
        """Of :attr:`units`, which must have an option each."""
        return Totals.of(self.units, self._cluster)

    @cached_property
    def bound(self) -> float:
        """No plan is faster, ms; infinite when it is certain that none fits."""
        return self.totals.lower_bound() if all(unit.options for unit in self.units) else np.inf

    def hopeless(self) -> bool:
        """Whether it is certain, at less cost than :attr:`bound`, that none fits."""
        return not all(unit.options for unit in self.units) or self.totals.too_large()

    def __iter__(self) -> Iterator[Placement]:
        if self.hopeless():
            return
        first = self._first()
        if first is None:
            return
        self._raw.append(first)
        yield first
        yield from self._placed(self._by_longest_shard())
        yield from self._best()
        if self._far():
            yield from self._placed(self._by_time_everywhere(self._least()))
            yield from self._best()
        for piece in _PIECES if self._thorough else ():
            if self._far():
                yield from self._placed(self._by_longest_shard(piece))
        yield from self._best()

    def _first(self) -> Placement | None:
        if any(option.storage.any() for unit in self._given for option in unit.options):
            return Packing(self._given, self._cluster, self._thorough).fitting()
        return place([unit.options[0] for unit in self._given], self._cluster)

    def _least(self) -> float:
        return min(placed.cost for placed in [*self._raw, *self._improved])

    def _far(self) -> bool:
        return self._least() > self.bound * (1 + CLOSE)

    def _placed(self, relaxations: Iterator[Relaxation]) -> Iterator[Placement]:
        """Each choice that is new and finds room: by LPT, or with more weight on storage."""
        for relaxed in relaxations:
            key = relaxed.choice.tobytes()
            if np.isinf(relaxed.mean) or key in self._seen:
                continue
            self._seen.add(key)
            chosen = [unit.options[k] for unit, k in zip(self.units, relaxed.choice, strict=True)]
            mean = max(sum(float(option.ms.sum()) for option in chosen) / self._cluster.world_size, 1e-9)
            orders = (by_time, by_both(self._cluster, mean), by_storage(self._cluster))
            tries = (place(chosen, self._cluster, order) for order in orders)
            found = next((placed for placed in tries if placed is not None), None)
            if found is not None:
                self._raw.append(found)
                yield found

    def _best(self) -> Iterator[Placement]:
        """The few fastest ones of those that are as they were placed, each improved."""
        self._raw.sort(key=lambda placement: placement.cost)
        fastest, self._raw = self._raw[:_IMPROVED], self._raw[_IMPROVED:]
        for placed in fastest:
            self._improved.append(improve(placed, self.units))
            yield self._improved[-1]

    def _by_longest_shard(self, piece: float = np.inf) -> Iterator[Relaxation]:
        totals, bound = self.totals, max(self.bound, 1e-9)
        shares = _SHARES if len(totals.capacity) else (1.0,)
        # With smaller pieces to pack, fewer times are tried.
        times = _TIMES if piece == np.inf else _TIMES // 4
        for time in np.geomspace(bound, max(totals.range[1], bound), times):
            for share in shares:
                yield totals.relaxed(float(time), share=share, piece=piece)

    def _by_time_everywhere(self, cost: float) -> Iterator[Relaxation]:
        for time in np.linspace(self.bound, cost, _TIMES // 2):
            for part in _PARTS:
                yield self.totals.relaxed(float(time), (part * float(time), part * float(time)))


class Packing:
    """How little of the scarce storage will do: the first kind that the units take.

    Plans are looked for with its bytes in place of time, so they do not depend on how much of it there is.

    Args:
        units, cluster, thorough: as for :class:`Plans`.
    """

    def __init__(self, units: Sequence[Unit], cluster: Cluster, thorough: bool = True) -> None:
        self._cluster, self._count = cluster, len(units)
        largest = np.max([option.storage.max(axis=0) for unit in units for option in unit.options], axis=0)
        self._kind = int(np.flatnonzero(largest)[0])
        capacity = cluster.capacity.copy()
        self._room = int(capacity[:, self._kind].max())
        held = self._room - capacity[:, self._kind]
        capacity[:, self._kind] = 0
        twins = [prune(Unit(unit.name, tuple(map(self._twin, unit.options)))) for unit in units]
        if held.any():
            # A rank with less room is one on which something lies that cannot be moved.
            nothing = np.zeros_like(capacity)
            twins.append(Unit("", (Option(None, Spread.EVERY, held.astype(np.float64), nothing),)))
        self._plans = Plans(twins, Cluster(cluster.local_size, capacity), thorough)

    def fitting(self) -> Placement | None:
        """The first plan found that fits."""
        # The bound is exact to a part in 100,000.
        if self._plans.bound > self._room * (1 + 1e-4):
            return None
        return next((plan for plan in self._found() if (plan.free >= 0).all()), None)

    def least(self) -> Placement | None:
        """The plan found that takes the least; it need not fit."""
        return max(self._found(), key=lambda plan: int(plan.free[:, self._kind].min()), default=None)

    def _found(self) -> Iterator[Placement]:
        for twin in self._plans:
            chosen = [option.key for option in twin.options[: self._count]]
            options = [option for option in chosen if isinstance(option, Option)]
            yield Placement.of(self._cluster, options, twin.ranks[: self._count])

    def _twin(self, option: Option) -> Option:
        storage = option.storage.copy()
        storage[:, self._kind] = 0
        return Option(option, option.spread, option.storage[:, self._kind].astype(np.float64), storage)
