"""What a sharding planner chooses between: units, ways to lay a unit over the ranks, and the ranks.

Torch-free. A *unit* is what lies together: one table, or the tables that share one array. An *option* is one
way to shard it, with the time and the bytes that each of its shards costs the rank it lies on. Options do
not name ranks: equal ranks are one class, told apart only by what already lies on them.

Letters: W = ranks, n = units, m = shards of an option, R = kinds of storage.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
# The kinds of storage, in the order of every array of bytes.
RESOURCES = ("hbm", "ddr", "ssd")


class Spread(Enum):
    """Which ranks the shards of an option may lie on."""

    ANY = "any"
    """Each shard on any rank; several may share one (table- and column-wise)."""
    HOST = "host"
    """One shard on each rank of one host (table-row-wise), or of several, host by host (grid)."""
    WITHIN_HOST = "within_host"
    """Each shard on any rank of one host (table-column-wise)."""
    EVERY = "every"
    """Shard r on rank r (row-wise, data-parallel)."""


@dataclass(frozen=True, eq=False)
class Option:
    """One way of sharding a unit.

    Attributes:
        key: names the option to whoever asked for the search.
        ms: [m] time of each shard on its rank, forward, backward and communication.
        storage: [m, R] bytes of each shard.
    """

    key: Hashable
    spread: Spread
    ms: Floats
    storage: Ints

    @property
    def num_shards(self) -> int:
        return len(self.ms)


@dataclass(frozen=True, eq=False)
class Unit:
    """What is placed as one, and its options."""

    name: str
    options: tuple[Option, ...]


@dataclass(frozen=True, eq=False)
class Cluster:
    """The ranks, ``local_size`` of them on each host.

    Attributes:
        capacity: [W, R] bytes free on each rank.
    """

    local_size: int
    capacity: Ints

    @property
    def world_size(self) -> int:
        return len(self.capacity)

    @property
    def num_hosts(self) -> int:
        return self.world_size // self.local_size

    @classmethod
    def uniform(cls, world_size: int, local_size: int, storage: Sequence[int]) -> Cluster:
        """Equal ranks of ``storage`` [R] bytes."""
        return cls(local_size, np.tile(np.asarray(storage, np.int64), (world_size, 1)))


def dominates(a: Option, b: Option) -> bool:
    """Whether every placement of ``b`` can be replaced by one of ``a`` that costs no rank more, in anything.

    Three cases are decided; each says which placement of ``a`` takes the place of a given one of ``b``:

    1. equal spread and as many shards: shard k where shard k was, when each is no larger;
    2. ``a`` may lie anywhere and has no more shards: shard k where shard k of ``b`` was, when the largest of
       ``a`` is no larger than the smallest of ``b``. So a table-wise option beats a row-wise or
       data-parallel one that costs every rank at least as much;
    3. ``a`` takes whole hosts and ``b`` every rank: any hosts, each once, under the same condition.
    """
    if a.spread is b.spread and a.num_shards == b.num_shards:
        return bool((a.ms <= b.ms).all() and (a.storage <= b.storage).all())
    anywhere = a.spread is Spread.ANY and a.num_shards <= b.num_shards
    hosts = a.spread is Spread.HOST and b.spread is Spread.EVERY and a.num_shards <= b.num_shards
    if not (anywhere or hosts):
        return False
    return bool(a.ms.max() <= b.ms.min() and (a.storage.max(axis=0) <= b.storage.min(axis=0)).all())


def possible(option: Option, cluster: Cluster) -> bool:
    """Whether each shard fits a rank that is empty."""
    room = cluster.capacity if option.spread is Spread.EVERY else cluster.capacity.max(axis=0)
    return bool((option.storage <= room).all())


def prune(unit: Unit) -> Unit:
    """The unit without its dominated options: no best plan is lost, nor any plan's feasibility.

    Of options that dominate each other the first is kept.
    """
    kept: list[Option] = []
    for option in unit.options:
        if any(dominates(other, option) for other in kept):
            continue
        kept = [other for other in kept if not dominates(option, other)]
        kept.append(option)
    return Unit(unit.name, tuple(kept))
