"""Local search: relieve the slowest rank until no single change does.

Changes that are tried, best first: another option for a unit on the slowest rank, one shard moved, two
shards exchanged. Each is taken only if the slowest of the ranks involved becomes faster, so it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recemb.planner.layout import Floats, Ints, Option, Spread, Unit
from recemb.planner.placement import Placement, host_for, spread_out

_ROUNDS = 400
_TOLERANCE = 1e-9
# Units on every rank that are tried in another option, the longest first.
_EVERYWHERE = 24


def improve(placement: Placement, units: Sequence[Unit]) -> Placement:
    """A placement that no single change makes faster, or the best after 400 changes."""
    best = placement.copy()
    shards = _Shards.of(best)
    for _ in range(_ROUNDS):
        if _move(best, shards) or _exchange(best, shards):
            continue
        if not _change_option(best, units):
            break
        shards = _Shards.of(best)
    return best


@dataclass(eq=False)
class _Shards:
    """All ``ANY`` shards of a placement, side by side: unit, shard number, rank, ms, bytes."""

    unit: Ints
    number: Ints
    rank: Ints
    ms: Floats
    storage: Ints

    @classmethod
    def of(cls, placement: Placement) -> _Shards:
        chosen = [i for i, option in enumerate(placement.options) if option.spread is Spread.ANY]
        counts = [placement.options[i].num_shards for i in chosen]
        none = np.zeros(0, np.int64)
        return cls(
            np.repeat(np.asarray(chosen, np.int64), counts),
            np.concatenate([none, *(np.arange(count) for count in counts)]),
            np.concatenate([none, *(placement.ranks[i] for i in chosen)]),
            np.concatenate([np.zeros(0), *(placement.options[i].ms for i in chosen)]),
            np.concatenate([placement.free[:0], *(placement.options[i].storage for i in chosen)]),
        )

    def relocate(self, placement: Placement, shard: int, rank: int) -> None:
        """Put a shard on another rank."""
        unit = int(self.unit[shard])
        option, ranks = placement.options[unit], placement.ranks[unit].copy()
        placement.remove(unit)
        ranks[self.number[shard]] = rank
        placement.add(unit, option, ranks)
        self.rank[shard] = rank


def _move(placement: Placement, shards: _Shards) -> bool:
    """One shard of the slowest rank to the rank that it makes least slow."""
    slowest = int(placement.loads.argmax())
    limit = placement.loads[slowest] * (1 - _TOLERANCE)
    best: tuple[float, int, int] | None = None
    for s in map(int, np.flatnonzero(shards.rank == slowest)):
        ms = float(shards.ms[s])
        fits = (placement.free >= shards.storage[s]).all(axis=1)
        after = np.where(fits, placement.loads + ms, np.inf)
        after[slowest] = np.inf
        target = int(after.argmin())
        worst = max(float(after[target]), placement.loads[slowest] - ms)
        if ms > 0 and worst < limit and (best is None or worst < best[0]):
            best = worst, s, target
    if best is None:
        return False
    shards.relocate(placement, best[1], best[2])
    return True


def _exchange(placement: Placement, shards: _Shards) -> bool:
    """One shard of the slowest rank against a shorter one elsewhere."""
    slowest = int(placement.loads.argmax())
    load = float(placement.loads[slowest])
    best: tuple[float, int, int] | None = None
    for s in map(int, np.flatnonzero(shards.rank == slowest)):
        gain = shards.ms[s] - shards.ms
        after = np.maximum(load - gain, placement.loads[shards.rank] + gain)
        after = np.where((shards.rank != slowest) & (gain > 0), after, np.inf)
        room = placement.free[shards.rank] + shards.storage
        after[(room < shards.storage[s]).any(axis=1)] = np.inf
        after[(placement.free[slowest] + shards.storage[s] < shards.storage).any(axis=1)] = np.inf
        t = int(after.argmin())
        if after[t] < load * (1 - _TOLERANCE) and (best is None or after[t] < best[0]):
            best = float(after[t]), s, t
    if best is None:
        return False
    _, s, t = best
    target = int(shards.rank[t])
    shards.relocate(placement, s, target)
    shards.relocate(placement, t, slowest)
    return True


def _change_option(placement: Placement, units: Sequence[Unit]) -> bool:
    """Another option for one of the units on the slowest rank, or for one that lies on every rank."""
    before = placement.cost
    slowest = int(placement.loads.argmax())
    here, everywhere = [], []
    for i, option in enumerate(placement.options):
        if option.spread is Spread.EVERY:
            everywhere.append(i)
        elif (placement.ranks[i] == slowest).any():
            here.append(i)
    everywhere.sort(key=lambda i: -float(placement.options[i].ms.max()))
    best: tuple[float, int, Option, Ints] | None = None
    for i in [*here, *everywhere[:_EVERYWHERE]]:
        old, old_ranks = placement.options[i], placement.ranks[i]
        placement.remove(i)
        for option in units[i].options:
            if option is old:
                continue
            ranks = _greedy(placement, option)
            if ranks is None:
                continue
            after = placement.loads.copy()
            np.add.at(after, ranks, option.ms)
            cost = float(after.max())
            if cost < before * (1 - _TOLERANCE) and (best is None or cost < best[0]):
                best = cost, i, option, ranks
        placement.add(i, old, old_ranks)
    if best is None:
        return False
    _, i, option, ranks = best
    placement.remove(i)
    placement.add(i, option, ranks)
    return True


def _greedy(placement: Placement, option: Option) -> Ints | None:
    """Ranks for an option on top of what is placed."""
    if option.spread is Spread.EVERY:
        fits = bool((placement.free >= option.storage).all())
        return np.arange(placement.cluster.world_size) if fits else None
    if option.spread is Spread.ANY:
        return spread_out(option, placement.loads, placement.free)
    return host_for(option, placement.cluster, placement.loads, placement.free)
