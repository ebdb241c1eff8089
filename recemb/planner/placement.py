"""Chosen options onto ranks: longest processing time first, within every rank's storage.

Graham's LPT rule (1969), with whole hosts placed before single ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from recemb.planner.layout import Cluster, Floats, Ints, Option, Spread

Order = Callable[[Option], float]


@dataclass(eq=False)
class Placement:
    """Where the chosen option of every unit lies.

    Attributes:
        options: [n] the chosen ones.
        ranks: [n] of [m]: the rank of each shard; of ``EVERY`` options it is 0 .. W - 1.
        loads: [W] ms.
        free: [W, R] bytes left.
    """

    cluster: Cluster
    options: list[Option]
    ranks: list[Ints]
    loads: Floats
    free: Ints

    @classmethod
    def of(cls, cluster: Cluster, options: list[Option], ranks: list[Ints]) -> Placement:
        """Options on ranks, whether they fit or not."""
        placed = cls(cluster, options, ranks, np.zeros(cluster.world_size), cluster.capacity.copy())
        for unit, option in enumerate(options):
            placed.add(unit, option, ranks[unit])
        return placed

    @property
    def cost(self) -> float:
        """Time of the slowest rank, ms."""
        return float(self.loads.max())

    @property
    def used(self) -> Ints:
        """[W, R] bytes of the shards on each rank."""
        return self.cluster.capacity - self.free

    def remove(self, unit: int) -> None:
        """Take a unit off its ranks."""
        option, ranks = self.options[unit], self.ranks[unit]
        np.subtract.at(self.loads, ranks, option.ms)
        np.add.at(self.free, ranks, option.storage)

    def add(self, unit: int, option: Option, ranks: Ints) -> None:
        """Put a unit on ranks."""
        self.options[unit], self.ranks[unit] = option, ranks
        np.add.at(self.loads, ranks, option.ms)
        np.subtract.at(self.free, ranks, option.storage)

    def copy(self) -> Placement:
        """An independent one."""
        return Placement(
            self.cluster, list(self.options), list(self.ranks), self.loads.copy(), self.free.copy()
        )


def by_time(option: Option) -> float:
    """LPT: the longest shard first."""
    return float(option.ms.max())


def by_both(cluster: Cluster, time: float) -> Order:
    """The shard first that takes the largest part of ``time`` or of a rank's storage."""
    storage = by_storage(cluster)
    return lambda option: max(storage(option), by_time(option) / time)


def by_storage(cluster: Cluster) -> Order:
    """The shard that fills the largest part of a rank first: for plans that hardly fit."""
    capacity = np.maximum(cluster.capacity.max(axis=0), 1)
    return lambda option: float((option.storage / capacity).max())


def place(options: Sequence[Option], cluster: Cluster, order: Order = by_time) -> Placement | None:
    """Place one option per unit, or ``None`` when a shard fits nowhere."""
    ranks: list[Ints | None] = [None] * len(options)
    loads = np.zeros(cluster.world_size)
    free = cluster.capacity.copy()
    everywhere = np.arange(cluster.world_size)
    for unit, option in enumerate(options):
        if option.spread is Spread.EVERY:
            loads += option.ms
            free -= option.storage
            ranks[unit] = everywhere
    if (free < 0).any():
        return None
    falling = sorted(range(len(options)), key=lambda unit: -order(options[unit]))
    for unit in falling:
        if options[unit].spread in (Spread.HOST, Spread.WITHIN_HOST):
            found = _host(options[unit], cluster, loads, free)
            if found is None:
                return None
            ranks[unit] = found
            np.add.at(loads, found, options[unit].ms)
            np.subtract.at(free, found, options[unit].storage)
    single = [unit for unit in falling if options[unit].spread is Spread.ANY]
    if not _singles(single, options, ranks, loads, free, cluster.local_size):
        return None
    return Placement(cluster, list(options), [r for r in ranks if r is not None], loads, free)


def _host(option: Option, cluster: Cluster, loads: Floats, free: Ints) -> Ints | None:
    """The ranks on the hosts that are left with the smallest largest load.

    A ``HOST`` option of g hosts (grid sharding) takes another host for each part, as long as there is one.
    """
    per_host = loads.reshape(cluster.num_hosts, cluster.local_size)
    room = free.reshape(cluster.num_hosts, cluster.local_size, -1)
    local = np.arange(cluster.local_size)
    if option.spread is Spread.WITHIN_HOST:
        for host in np.argsort(per_host.sum(axis=1), kind="stable"):
            inner = _spread_out(option, per_host[host].copy(), room[host].copy())
            if inner is not None:
                return np.asarray(inner + host * cluster.local_size, np.int64)
        return None
    taken: list[Ints] = []
    fresh = np.ones(cluster.num_hosts, np.bool_)
    per_host, room = per_host.copy(), room.copy()
    for part in range(0, option.num_shards, cluster.local_size):
        ms, storage = (array[part : part + cluster.local_size] for array in (option.ms, option.storage))
        after = per_host + ms
        fits = (room >= storage).all(axis=(1, 2))
        allowed = fits & fresh if (fits & fresh).any() else fits
        if not allowed.any():
            return None
        worst = np.where(allowed, after.max(axis=1), np.inf)
        best = int(np.lexsort((after.sum(axis=1), worst))[0])
        per_host[best], fresh[best] = after[best], False
        room[best] -= storage
        taken.append(local + best * cluster.local_size)
    return np.concatenate(taken)


def _spread_out(option: Option, loads: Floats, free: Ints) -> Ints | None:
    """Each shard, the longest first, on the rank of least load that has room; changes ``loads``, ``free``."""
    ranks = np.zeros(option.num_shards, np.int64)
    for shard in np.argsort(-option.ms, kind="stable"):
        fits = (free >= option.storage[shard]).all(axis=1)
        if not fits.any():
            return None
        rank = int(np.where(fits, loads, np.inf).argmin())
        ranks[shard] = rank
        loads[rank] += option.ms[shard]
        free[rank] -= option.storage[shard]
    return ranks


def spread_out(option: Option, loads: Floats, free: Ints) -> Ints | None:
    """Where the shards of an ``ANY`` option go greedily, given the ranks' loads; ``None`` without room."""
    return _spread_out(option, loads.copy(), free.copy())


def host_for(option: Option, cluster: Cluster, loads: Floats, free: Ints) -> Ints | None:
    """Where a ``HOST`` or ``WITHIN_HOST`` option goes greedily; ``None`` without room."""
    return _host(option, cluster, loads, free)


def _singles(
    units: Sequence[int],
    options: Sequence[Option],
    ranks: list[Ints | None],
    loads: Floats,
    free: Ints,
    local_size: int,
) -> bool:
    """LPT over a heap of ranks; equal loads go round the hosts, whose memory the ranks of one share."""
    heap = [(float(load), rank % local_size, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    room: list[list[int]] = free.tolist()
    for unit in units:
        option = options[unit]
        chosen = np.zeros(option.num_shards, np.int64)
        times, sizes = option.ms.tolist(), option.storage.tolist()
        for shard in sorted(range(option.num_shards), key=lambda k: -times[k]):
            size, full = sizes[shard], []
            while heap:
                load, local, rank = heap[0]
                if all(s <= f for s, f in zip(size, room[rank], strict=True)):
                    heapq.heapreplace(heap, (load + times[shard], local, rank))
                    room[rank] = [f - s for s, f in zip(size, room[rank], strict=True)]
                    chosen[shard] = rank
                    break
                full.append(heapq.heappop(heap))
            else:
                return False
            for entry in full:
                heapq.heappush(heap, entry)
        ranks[unit] = chosen
    for load, _, rank in heap:
        loads[rank] = load
    free[:] = room
    return True
