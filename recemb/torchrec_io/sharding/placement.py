"""Where compressed tables may lie, and torchrec's shardings with their kernel."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torchrec.distributed.embedding_sharding import EmbeddingShardingInfo
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.sharding.dp_sharding import DpPooledEmbeddingSharding
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingSharding
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingEnv2D, ShardingType
from torchrec.modules.embedding_configs import DataType, PoolingType

from recemb.errors import ConfigError
from recemb.spec import TableSpec
from recemb.torchrec_io.sharding.kernel import CompressedLookup
from recemb.torchrec_io.sharding.tables import CompressedTables

TABLE_WISE, DATA_PARALLEL = ShardingType.TABLE_WISE.value, ShardingType.DATA_PARALLEL.value
ROWS_SPLIT = (ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value)
_FIX = "plan it table_wise(rank=...) or data_parallel()"


@dataclass
class CompressedShardingInfo(EmbeddingShardingInfo):  # type: ignore[misc] # torchrec ships no types
    """torchrec's, of a compressed table."""

    tables: CompressedTables | None = None

    @classmethod
    def of(cls, info: EmbeddingShardingInfo, tables: CompressedTables) -> CompressedShardingInfo:
        """``info`` such that torchrec puts all compressed tables of a rank in one group.

        It groups tables by type, pooling and optimizer; the engine pools each as its own spec says, and looks
        tables that share an array up together.
        """
        config = replace(
            info.embedding_config, pooling=PoolingType.SUM, data_type=DataType.FP32, stash_weights=False
        )
        return cls(config, info.param_sharding, info.param, fused_params={}, tables=tables)


class CompressedTwSharding(TwPooledEmbeddingSharding):  # type: ignore[misc] # torchrec ships no types
    """Table-wise: each table on one rank, with its fused optimizer."""

    def __init__(self, sharding_infos: Sequence[EmbeddingShardingInfo], *rest: Any, **named: Any) -> None:
        super().__init__(sharding_infos, *rest, **named)
        self._tables = tables_of(sharding_infos)

    def create_lookup(
        self, device: torch.device | None = None, fused_params: Any = None, feature_processor: Any = None
    ) -> CompressedLookup:
        return CompressedLookup(
            self._tables,
            fused=True,
            grouped_configs=self._grouped_embedding_configs,
            pg=self._pg,
            device=device if device is not None else self._device,
            feature_processor=feature_processor,
            env=self._env,
        )


class CompressedDpSharding(DpPooledEmbeddingSharding):  # type: ignore[misc] # torchrec ships no types
    """Data-parallel: each table on every rank, its gradients averaged by DDP."""

    def __init__(self, sharding_infos: Sequence[EmbeddingShardingInfo], *rest: Any, **named: Any) -> None:
        super().__init__(sharding_infos, *rest, **named)
        self._tables = tables_of(sharding_infos)

    def create_lookup(
        self, device: torch.device | None = None, fused_params: Any = None, feature_processor: Any = None
    ) -> CompressedLookup:
        return CompressedLookup(
            self._tables,
            fused=False,
            grouped_configs=self._grouped_embedding_configs,
            pg=self._env.process_group,
            device=device if device is not None else self._device,
            feature_processor=feature_processor,
            # Only gradients that come through an all-to-all are divided by the number of ranks.
            scale_weight_gradients=False,
            env=self._env,
        )


def tables_of(infos: Sequence[EmbeddingShardingInfo]) -> CompressedTables:
    """The compressed tables that ``infos``, one of which is of such a table, refer to."""
    return next(info.tables for info in infos if isinstance(info, CompressedShardingInfo) and info.tables)


def customized(sharding: ParameterSharding) -> ParameterSharding:
    """``sharding`` with the compute kernel under which torchrec leaves a table to its child class."""
    own = copy.copy(sharding)
    own.compute_kernel = EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value
    return own


def sharding_types(table: TableSpec) -> tuple[str, ...]:
    """The values of torchrec's ``ShardingType`` a compressed table can be planned with."""
    return (TABLE_WISE, DATA_PARALLEL)


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


def check_plan(tables: CompressedTables, names: Sequence[str], plan: Mapping[str, ParameterSharding]) -> None:
    """Raise :class:`ConfigError` unless every table is planned, and every compressed one as it can be.

    Args:
        tables: the compressed tables.
        names: of all tables of the collection.
        plan: by table name.
    """
    missing = [name for name in names if name not in plan]
    if missing:
        raise ConfigError(f"the sharding plan has nothing for the tables {missing}; plan every table")
    for name, table in tables.specs.items():
        kind = plan[name].sharding_type
        if table.cache_rows:
            raise ConfigError(
                f"table {name!r}: cache={table.compression.cache} is not supported in a sharded collection; "
                "remove it, or train this model on one device"
            )
        if kind not in sharding_types(table):
            raise ConfigError(
                f"table {name!r} ({table.compression}) is planned {kind}; a compressed table is not split: "
                f"{_FIX}. For torchrec's planner: constraints={{{name!r}: "
                f"ParameterConstraints(sharding_types={list(sharding_types(table))})}}"
            )
    for _, peers in tables.storages:
        _check_together(peers, plan)


def _check_together(peers: Sequence[TableSpec], plan: Mapping[str, ParameterSharding]) -> None:
    places = {peer.name: _place(plan[peer.name]) for peer in peers}
    if len(set(places.values())) > 1:
        shown = ", ".join(f"{name!r} {place}" for name, place in places.items())
        raise ConfigError(
            f"the tables {list(places)} share one array and are planned apart ({shown}); plan all of them "
            "table_wise on one rank, all data_parallel(), or give them groups of their own: "
            f"ROBE(group={peers[0].name!r}, ...)"
        )


def _place(sharding: ParameterSharding) -> str:
    if sharding.sharding_type == DATA_PARALLEL:
        return "data_parallel"
    return f"{sharding.sharding_type} on rank {sharding.ranks[0]}"
