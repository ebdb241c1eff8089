"""recemb's search behind torchrec's ``Proposer``, ``Partitioner`` and ``PerfModel``.

torchrec's planner asks proposers for one option per table, has a partitioner lay them over the ranks, rates
the plan, and tells the proposer. Here the first proposal only asks for the storage that is free; the second
is the plan that :func:`recemb.planner.search.search` found, ranks and all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torchrec.distributed.planner.types import (
    Enumerator,
    Partitioner,
    PerfModel,
    PlannerError,
    PlannerErrorType,
    Proposer,
    Shard,
    ShardingOption,
    Topology,
)
from torchrec.distributed.types import ShardingType

from recemb.errors import ConfigError
from recemb.planner.layout import RESOURCES, Cluster, Floats, Ints, Option, Spread, Unit
from recemb.planner.placement import Placement, by_storage, by_time, place
from recemb.planner.search import Found, search
from recemb.torchrec_io.planning.enumerator import EveryRank

_SPREAD = {
    ShardingType.TABLE_WISE.value: Spread.ANY,
    ShardingType.COLUMN_WISE.value: Spread.ANY,
    ShardingType.TABLE_ROW_WISE.value: Spread.HOST,
    ShardingType.GRID_SHARD.value: Spread.HOST,
    ShardingType.TABLE_COLUMN_WISE.value: Spread.WITHIN_HOST,
    ShardingType.ROW_WISE.value: Spread.EVERY,
    ShardingType.DATA_PARALLEL.value: Spread.EVERY,
}
Options = tuple[ShardingOption, ...]
# Below what torchrec starts from, so that it still is a plan.
_BEHIND = 2.0**62


def cluster_of(topology: Topology) -> Cluster:
    """The ranks of a topology; a host is what row-wise parts of one table are kept in."""
    capacity = [[getattr(device.storage, kind) for kind in RESOURCES] for device in topology.devices]
    return Cluster(topology.intra_group_size, np.asarray(capacity, np.int64))


def layout(options: Options) -> Option:
    """The options of the tables of one unit, all of one sharding type, as one."""
    parts = [_costs(option.shards) for option in options]
    ms = np.sum([ms for ms, _ in parts], axis=0)
    storage = np.sum([storage for _, storage in parts], axis=0)
    return Option(options, _SPREAD[options[0].sharding_type], ms, storage)


def _costs(shards: Sequence[Shard]) -> tuple[Floats, Ints]:
    distinct = shards.distinct if isinstance(shards, EveryRank) else shards
    ms = np.asarray([shard.perf.total for shard in distinct])
    storage = np.asarray(
        [[getattr(shard.storage, kind) for kind in RESOURCES] for shard in distinct], np.int64
    )
    if not isinstance(shards, EveryRank):
        return ms, storage
    if len(distinct) == 1:
        count = len(shards)
        return np.broadcast_to(ms, (count,)), np.broadcast_to(storage, (count, len(RESOURCES)))
    return ms[shards.which], storage[shards.which]


def units_of(search_space: Sequence[ShardingOption]) -> list[Unit]:
    """One unit per table, or per group of tables that share an array: those must lie together.

    A group is planned whole on one rank or on every rank; it takes the options that all its tables have.

    Raises:
        ConfigError: they have none in common.
    """
    tables: dict[str, dict[str, list[ShardingOption]]] = {}
    for option in search_space:
        tables.setdefault(option.dependency or option.fqn, {}).setdefault(option.fqn, []).append(option)
    units = []
    for name, by_table in tables.items():
        first, *rest = by_table.values()
        options = []
        for option in first:
            kind = option.sharding_type, option.compute_kernel
            twins = [[o for o in other if (o.sharding_type, o.compute_kernel) == kind] for other in rest]
            if all(twins):
                options.append(layout((option, *(twin[0] for twin in twins))))
        if not options:
            names = [each[0].name for each in by_table.values()]
            raise ConfigError(
                f"the tables {names} share one array and must be planned alike; no sharding type is "
                "left to all; give them the same ParameterConstraints"
            )
        units.append(Unit(name, tuple(options)))
    return units


class PlanProposer(Proposer):  # type: ignore[misc] # torchrec ships no types
    """Proposes the plan that the search finds, once it knows the storage.

    Attributes:
        found: the search's outcome, with its lower bound.
    """

    def __init__(self) -> None:
        self.found: Found | None = None
        self._units: list[Unit] = []
        self._step = 0

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        """Take the options of all tables."""
        self.found = None
        self._units = units_of(search_space)
        self._step = 0

    def propose(self) -> list[ShardingOption] | None:
        """One option per table, or ``None`` at the end."""
        if self._step == 0:
            return [option for unit in self._units for option in _tables(unit.options[0])]
        # torchrec clears the ranks of the last proposal, which shares options with this one, just before.
        placement = None if self.found is None else self.found.placement
        return None if placement is None or self._step > 1 else assign(placement)

    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        """Search when the storage is known."""
        self._step += 1
        if self.found is None and storage_constraint is not None:
            self.found = search(self._units, cluster_of(storage_constraint))


def _tables(option: Option) -> Options:
    key = option.key
    assert isinstance(key, tuple)
    return key


def assign(placement: Placement) -> list[ShardingOption]:
    """Write a placement's ranks into the shards of its tables, and return their options."""
    chosen = []
    for option, ranks in zip(placement.options, placement.ranks, strict=True):
        for table in _tables(option):
            if not isinstance(table.shards, EveryRank):
                for shard, rank in zip(table.shards, ranks.tolist(), strict=True):
                    shard.rank = rank
            chosen.append(table)
    return chosen


class PlanPartitioner(Partitioner):  # type: ignore[misc] # torchrec ships no types
    """Lays options over the ranks by LPT; keeps ranks that a proposal comes with, if they fit.

    Tables that share an array, told by ``dependency``, are laid together. torchrec's own partitioner refuses
    a dependency of table-wise options.
    """

    def partition(self, proposal: list[ShardingOption], storage_constraint: Topology) -> list[ShardingOption]:
        """Fill in the rank of every shard.

        Raises:
            PlannerError: a shard fits nowhere.
        """
        cluster = cluster_of(storage_constraint)
        if all(shard.rank is not None for option in proposal for shard in _own(option)):
            used = np.zeros_like(cluster.capacity)
            for option in proposal:
                ranks = [shard.rank for shard in option.shards]
                np.add.at(used, ranks, _costs(option.shards)[1])
            if (used <= cluster.capacity).all():
                return proposal
        groups: dict[str, list[ShardingOption]] = {}
        for option in proposal:
            groups.setdefault(option.dependency or option.fqn, []).append(option)
        options = [layout(tuple(group)) for group in groups.values()]
        placement = place(options, cluster, by_time)
        if placement is None:
            placement = place(options, cluster, by_storage(cluster))
        if placement is None:
            raise PlannerError(
                error_type=PlannerErrorType.PARTITION,
                message="a shard of this proposal fits on no rank",
            )
        assign(placement)
        return proposal


def _own(option: ShardingOption) -> Sequence[Shard]:
    """Shards whose rank is not given by their place."""
    return () if isinstance(option.shards, EveryRank) else option.shards


class SlowestRank(PerfModel):  # type: ignore[misc] # torchrec ships no types
    """torchrec's rating, the time of the slowest rank, without a Python step for every shard.

    Args:
        proposer: whose first proposal is rated behind any plan that it finds, also one of equal time.
    """

    def __init__(self, topology: Topology, proposer: PlanProposer) -> None:
        self._topology, self._proposer = topology, proposer

    def rate(self, plan: list[ShardingOption]) -> float:
        """Milliseconds."""
        if self._proposer.found is None:
            return _BEHIND
        return float(rank_loads(plan, self._topology.world_size).max())


def rank_loads(plan: Sequence[ShardingOption], world_size: int) -> Floats:
    """[W] ms of each rank under a plan."""
    loads = np.zeros(world_size)
    for option in plan:
        ms, _ = _costs(option.shards)
        if isinstance(option.shards, EveryRank):
            loads += ms
        else:
            np.add.at(loads, [shard.rank for shard in option.shards], ms)
    return loads
