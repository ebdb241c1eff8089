"""A plan in figures: tables, ranks, and the plans it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from torchrec.distributed.planner.types import ShardingOption
from torchrec.distributed.types import ShardingType

from recemb.backends.memory import memory_report
from recemb.planner.baselines import Figures, baselines
from recemb.planner.layout import Unit
from recemb.planner.placement import Placement
from recemb.planner.report import PlanLine, RankLine, TableLine, milliseconds
from recemb.spec import ROBE, MixedDimension, QuotientRemainder, TableSpec, TensorTrain
from recemb.torchrec_io.planning.enumerator import EveryRank
from recemb.torchrec_io.planning.planned import Planned
from recemb.torchrec_io.planning.search import units_of

_SHORT = {
    ShardingType.TABLE_WISE.value: "TW",
    ShardingType.COLUMN_WISE.value: "CW",
    ShardingType.TABLE_COLUMN_WISE.value: "TWCW",
    ShardingType.ROW_WISE.value: "RW",
    ShardingType.TABLE_ROW_WISE.value: "TWRW",
    ShardingType.GRID_SHARD.value: "GRID",
    ShardingType.DATA_PARALLEL.value: "DP",
}
_KERNEL = {"fused_uvm": "+uvm", "fused_uvm_caching": "+cache"}
_RULES = {
    "size": "size",
    "dim": "dim",
    "lookups": "lookups",
    "size_lookups": "log size x lookups",
    "lpt": "ms (LPT)",
}
LEGEND = (
    "TW table-wise, RW row-wise, CW column-wise, TWRW row-wise in a host, DP data-parallel; +uvm in DDR,\n"
    "+cache in DDR with rows cached in HBM; +hot with rows kept uncompressed. ms: forward, backward and\n"
    "communication of a step, estimated."
)


def method_of(table: TableSpec) -> str:
    """``tt R=32 +hot``: a table's method, its main setting, and whether it has cached rows."""
    return _setting_of(table) + (" +hot" if table.cache_rows else "")


def _setting_of(table: TableSpec) -> str:
    compression = table.compression
    if isinstance(compression, TensorTrain):
        rank = compression.rank
        return f"tt R={rank if isinstance(rank, int) else max(rank)}"
    if isinstance(compression, QuotientRemainder):
        return f"qr c={compression.collisions}"
    if isinstance(compression, MixedDimension):
        return f"md d={compression.dim}"
    if isinstance(compression, ROBE):
        return f"robe Z={compression.block_size}"
    return compression.method


def table_lines(planned: Planned) -> list[TableLine]:
    """One line per table, in their order."""
    chosen = {option.name: option for option in planned.options}
    lines = []
    for table, record in zip(planned.request.tables, memory_report(planned.request.tables), strict=True):
        option = chosen[table.name]
        lines.append(
            TableLine(
                table=table.name,
                method=method_of(table),
                dense_bytes=record.dense_bytes,
                num_bytes=record.num_bytes,
                sharding=_SHORT[option.sharding_type] + _KERNEL.get(option.compute_kernel, ""),
                ranks=_ranks(option, planned.cluster.world_size),
                ms=max(shard.perf.total for shard in _distinct(option)),
            )
        )
    return lines


def rank_lines(planned: Planned) -> list[RankLine]:
    """One line per rank."""
    world = planned.cluster.world_size
    shards = np.zeros(world, np.int64)
    figures = np.zeros((world, 4))
    for option in planned.options:
        distinct = _distinct(option)
        own = np.asarray([_figures(shard) for shard in distinct])
        if isinstance(option.shards, EveryRank):
            figures += own[option.shards.which]
            shards += 1
        else:
            ranks = [shard.rank for shard in option.shards]
            np.add.at(figures, ranks, own)
            np.add.at(shards, ranks, 1)
    return [
        RankLine(rank, int(count), int(hbm), int(ddr), float(compute), float(comms))
        for rank, (count, (hbm, ddr, compute, comms)) in enumerate(zip(shards, figures, strict=True))
    ]


def _figures(shard: Any) -> tuple[float, float, float, float]:
    perf = shard.perf
    compute = perf.fwd_compute + perf.bwd_compute + perf.prefetch_compute
    return shard.storage.hbm, shard.storage.ddr, compute, perf.fwd_comms + perf.bwd_comms


def _distinct(option: ShardingOption) -> Sequence[Any]:
    return option.shards.distinct if isinstance(option.shards, EveryRank) else option.shards


def _ranks(option: ShardingOption, world_size: int) -> str:
    if isinstance(option.shards, EveryRank):
        return f"all {world_size}"
    ranks = [shard.rank for shard in option.shards]
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[0] + len(ranks))):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks))


def plan_line(name: str, placement: Placement | None) -> PlanLine:
    """A plan's line in a comparison."""
    if placement is None:
        return PlanLine(name, None)
    used = placement.used.sum(axis=1)
    mean = float(placement.loads.mean())
    return PlanLine(
        name, placement.cost, placement.cost / mean if mean else 1.0, int(used.max()), int(used.sum())
    )


def baseline_lines(name: str, planned: Planned) -> list[PlanLine]:
    """The lines of AutoShard's and EcoRec's rules on the same tables."""
    factors = {
        table.name: (table, factor)
        for table, factor in zip(planned.request.tables, planned.request.pooling_factors, strict=True)
    }
    figures = [figure for unit in units_of(planned.search_space) for figure in _whole(unit, factors)]
    if len(figures) < len(units_of(planned.search_space)):
        return []
    placed = baselines(figures, planned.cluster)
    return [plan_line(f"{name}, TW by {_RULES[rule]}", placement) for rule, placement in placed.items()]


def _whole(unit: Unit, factors: dict[str, tuple[TableSpec, float]]) -> list[Figures]:
    """A unit's table-wise option with the figures that the rules go by; nothing without one."""
    for option in unit.options:
        tables = option.key
        assert isinstance(tables, tuple)
        if tables[0].sharding_type == ShardingType.TABLE_WISE.value and tables[0].compute_kernel == "fused":
            known = [factors[table.name] for table in tables]
            return [
                Figures(
                    size=float(sum(table.tensor.numel() for table in tables)),
                    rows=float(max(table.num_embeddings for table, _ in known)),
                    dim=float(sum(table.embedding_dim for table, _ in known)),
                    lookups=float(sum(table.embedding_dim * factor for table, factor in known)),
                    option=option,
                )
            ]
    return []


def bottleneck(planned: Planned, ranks: Sequence[RankLine]) -> str:
    """The slowest rank, what binds it, and its slowest tables."""
    slowest = max(ranks, key=lambda line: line.ms)
    here = []
    for option in planned.options:
        if isinstance(option.shards, EveryRank):
            here.append((option.shards[slowest.rank].perf.total, option.name))
        else:
            ms = sum(shard.perf.total for shard in option.shards if shard.rank == slowest.rank)
            here.append((ms, option.name))
    here.sort(key=lambda pair: -pair[0])
    named = ", ".join(f"{name[:20]} {milliseconds(ms)}" for ms, name in here[:2] if ms > 0)
    kind = "compute" if slowest.compute_ms >= slowest.comms_ms else "communication"
    return f"bottleneck: rank {slowest.rank}, {milliseconds(slowest.ms)} ms, mostly {kind}: {named} ms"


def reasons(planned: Planned) -> list[str]:
    """Why tables lie where they do, where it is not their own time and size alone."""
    groups: dict[str, list[ShardingOption]] = {}
    for option in planned.options:
        if option.dependency is not None:
            groups.setdefault(option.dependency, []).append(option)
    lines = []
    for options in groups.values():
        first = options[0]
        where = "on every rank" if isinstance(first.shards, EveryRank) else f"on rank {first.shards[0].rank}"
        kinds: dict[str, set[str]] = {}
        for option in planned.search_space:
            if option.dependency == first.dependency:
                kinds.setdefault(option.fqn, set()).add(option.sharding_type)
        # One with cached rows keeps the others from lying on every rank.
        choice = len(set.intersection(*kinds.values())) > 1
        lines.append(
            f"{len(options)} tables ({first.name} ... {options[-1].name}) share one array and must lie on "
            f"one rank{' or on all' if choice else ''}: planned {where}{', the faster' if choice else ''}"
        )
    return lines


def estimate(planned: Planned, compared: Sequence[PlanLine]) -> dict[str, Any]:
    """The figures that go into a plan's file."""
    ranks = rank_lines(planned)
    return {
        "step_ms": planned.found.placement.cost if planned.found.placement else None,
        "lower_bound_ms": planned.found.bound,
        "gap": planned.found.gap,
        "planning_seconds": round(planned.seconds, 3),
        "workspace_bytes": planned.workspace,
        "bottleneck": bottleneck(planned, ranks),
        "tables": [asdict(line) for line in table_lines(planned)],
        "ranks": [asdict(line) | {"ms": line.ms} for line in ranks],
        "compared": [asdict(line) for line in compared],
        "reasons": reasons(planned),
        "costs": planned.request.costs.as_dict(),
    }
