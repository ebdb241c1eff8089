"""Local search: relieve the slowest rank until no single change does.

Changes that are tried, best first: another option for a unit on the slowest rank, one shard moved, two
shards exchanged. Each is taken only if the slowest of the ranks involved becomes faster, so it ends.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    for _ in range(_ROUNDS):
        if not (_move(best) or _exchange(best) or _change_option(best, units)):
            break
    return best


def _shards(placement: Placement) -> tuple[Ints, Ints, Ints, Floats, Ints]:
    """Of all ``ANY`` shards: unit, shard number, rank, ms, bytes."""
    chosen = [i for i, option in enumerate(placement.options) if option.spread is Spread.ANY]
    counts = [placement.options[i].num_shards for i in chosen]
    if not chosen:
        none = np.zeros(0, np.int64)
        return none, none, none, np.zeros(0), np.zeros((0, placement.free.shape[1]), np.int64)
    return (
        np.repeat(np.asarray(chosen), counts),
        np.concatenate([np.arange(count) for count in counts]),
        np.concatenate([placement.ranks[i] for i in chosen]),
        np.concatenate([placement.options[i].ms for i in chosen]),
        np.concatenate([placement.options[i].storage for i in chosen]),
    )


def _move(placement: Placement) -> bool:
    """One shard of the slowest rank to the rank that it makes least slow."""
    unit, number, rank, ms, storage = _shards(placement)
    slowest = int(placement.loads.argmax())
    limit = placement.loads[slowest] * (1 - _TOLERANCE)
    best: tuple[float, int, int] | None = None
    for s in map(int, np.flatnonzero(rank == slowest)):
        after = np.where((placement.free >= storage[s]).all(axis=1), placement.loads + ms[s], np.inf)
        after[slowest] = np.inf
        target = int(after.argmin())
        worst = max(float(after[target]), placement.loads[slowest] - float(ms[s]))
        if ms[s] > 0 and worst < limit and (best is None or worst < best[0]):
            best = worst, s, target
    if best is None:
        return False
    _relocate(placement, int(unit[best[1]]), int(number[best[1]]), best[2])
    return True


def _exchange(placement: Placement) -> bool:
    """One shard of the slowest rank against a shorter one elsewhere."""
    unit, number, rank, ms, storage = _shards(placement)
    slowest = int(placement.loads.argmax())
    load = float(placement.loads[slowest])
    elsewhere = rank != slowest
    best: tuple[float, int, int] | None = None
    for s in map(int, np.flatnonzero(rank == slowest)):
        gain = ms[s] - ms
        after = np.maximum(load - gain, placement.loads[rank] + gain)
        fits = (placement.free[rank] + storage >= storage[s]).all(axis=1)
        fits &= (placement.free[slowest] + storage[s] >= storage).all(axis=1)
        after = np.where(elsewhere & fits & (gain > 0), after, np.inf)
        t = int(after.argmin())
        if after[t] < load * (1 - _TOLERANCE) and (best is None or after[t] < best[0]):
            best = float(after[t]), s, t
    if best is None:
        return False
    _, s, t = best
    target = int(rank[t])
    _relocate(placement, int(unit[s]), int(number[s]), target)
    _relocate(placement, int(unit[t]), int(number[t]), slowest)
    return True


def _relocate(placement: Placement, unit: int, shard: int, rank: int) -> None:
    option, ranks = placement.options[unit], placement.ranks[unit].copy()
    placement.remove(unit)
    ranks[shard] = rank
    placement.add(unit, option, ranks)


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
