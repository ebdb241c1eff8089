"""Where compressed tables may lie: what a plan can say of them, and what it cannot."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingEnv2D, ShardingType

from recemb.errors import ConfigError
from recemb.spec import TableSpec
from recemb.torchrec_io.sharding.held import DATA_PARALLEL, ROW_WISE, TABLE_WISE, row_split
from recemb.torchrec_io.sharding.tables import CompressedTables

ROWS_SPLIT = (ROW_WISE, ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value)
_WAYS = {TABLE_WISE: "table_wise(rank=...)", DATA_PARALLEL: "data_parallel()", ROW_WISE: "row_wise()"}


def customized(sharding: ParameterSharding) -> ParameterSharding:
    """``sharding`` with the compute kernel under which torchrec leaves a table to its child class."""
    own = copy.copy(sharding)
    own.compute_kernel = EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value
    return own


def sharding_types(table: TableSpec) -> tuple[str, ...]:
    """The values of torchrec's ``ShardingType`` a compressed table can be planned with.

    A cached one only whole on one rank: elsewhere ranks would see other ids hot, and exchange other rows.
    """
    if table.cache_rows:
        return (TABLE_WISE,)
    whole = (TABLE_WISE, DATA_PARALLEL)
    return whole if row_split(table, 1) is None else (*whole, ROW_WISE)


def part_on(rank: int, table: TableSpec, sharding: ParameterSharding) -> TableSpec | None:
    """What a rank holds of an uncompressed table, as a table of its own; ``None`` for nothing.

    A rank's shards have the same rows: they are cut by columns, or rows are cut into one part a rank.
    """
    if sharding.sharding_type == DATA_PARALLEL:
        return table
    shards = [shard for shard in sharding.sharding_spec.shards if shard.placement.rank() == rank]
    rows = max((shard.shard_sizes[0] for shard in shards), default=0)
    columns = sum(shard.shard_sizes[1] for shard in shards)
    return replace(table, num_embeddings=rows, embedding_dim=columns) if rows * columns else None


def check_environment(env: ShardingEnv) -> None:
    """Raise :class:`ConfigError` for a kind of parallelism that would leave compressed tables out of step."""
    if isinstance(env, ShardingEnv2D):
        raise ConfigError(
            "compressed tables cannot be sharded in 2D (DMPCollection): it keeps only fbgemm's tables in "
            "step over the replicas; use DistributedModelParallel"
        )
    if env.output_dtensor:
        raise ConfigError(
            "compressed tables cannot be saved as DTensors; build the ShardingEnv with output_dtensor=False"
        )


def check_plan(
    tables: CompressedTables, names: Sequence[str], plan: Mapping[str, ParameterSharding], ranks: int
) -> None:
    """Raise :class:`ConfigError` unless every table is planned, and every compressed one as it can be.

    Args:
        tables: the compressed tables.
        names: of all tables of the collection.
        plan: by table name.
        ranks: how many there are.
    """
    missing = [name for name in names if name not in plan]
    if missing:
        raise ConfigError(f"the sharding plan has nothing for the tables {missing}; plan every table")
    for name, table in tables.specs.items():
        kind = plan[name].sharding_type
        if kind not in sharding_types(table):
            fix = " or ".join(_WAYS[way] for way in sharding_types(table))
            why = ": its cached rows lie with it on one rank" if table.cache_rows else ""
            raise ConfigError(
                f"table {name!r} ({table.compression}) is planned {kind}, which it cannot be{why}; plan it "
                f"{fix}. For torchrec's planner: constraints={{{name!r}: "
                f"ParameterConstraints(sharding_types={list(sharding_types(table))})}}"
            )
        beyond = [rank for rank in plan[name].ranks or () if rank >= ranks]
        if beyond:
            raise ConfigError(f"table {name!r} is planned on rank {beyond[0]} and there are {ranks} ranks")
        if kind == ROW_WISE:
            _ = row_split(table, ranks)
            if list(plan[name].ranks or ()) != list(range(ranks)):
                raise ConfigError(
                    f"table {name!r} is planned row_wise on the ranks {plan[name].ranks}; a compressed table "
                    f"is cut over all {ranks} ranks in their order: plan it row_wise()"
                )
    for _, peers in tables.storages:
        _check_together(peers, plan)


def _check_together(peers: Sequence[TableSpec], plan: Mapping[str, ParameterSharding]) -> None:
    places = {peer.name: _place(plan[peer.name]) for peer in peers}
    if len(set(places.values())) > 1:
        shown = ", ".join(f"{name!r} {place}" for name, place in places.items())
        cached = any(peer.cache_rows for peer in peers)
        together = "table_wise on one rank" + ("" if cached else ", all data_parallel()")
        raise ConfigError(
            f"the tables {list(places)} share one array and are planned apart ({shown}); plan all of them "
            f"{together}, or give them groups of their own: ROBE(group={peers[0].name!r}, ...)"
        )


def _place(sharding: ParameterSharding) -> str:
    if sharding.sharding_type == DATA_PARALLEL:
        return "data_parallel"
    return f"{sharding.sharding_type} on rank {sharding.ranks[0]}"
