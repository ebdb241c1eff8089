"""torchrec's shardings, with the house's kernel for their compressed tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec.api import EnumerableShardingSpec
from torchrec.distributed.embedding_sharding import EmbeddingShardingInfo
from torchrec.distributed.sharding.dp_sharding import DpPooledEmbeddingSharding
from torchrec.distributed.sharding.rw_sharding import RwSparseFeaturesDist
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingSharding
from torchrec.distributed.types import ShardingEnv, ShardingType
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.torchrec_io.sharding.even import EvenRwSharding
from recemb.torchrec_io.sharding.held import DATA_PARALLEL, ROW_WISE, Held, row_split
from recemb.torchrec_io.sharding.kernel import CompressedLookup
from recemb.torchrec_io.sharding.tables import CompressedTables


@dataclass
class CompressedShardingInfo(EmbeddingShardingInfo):  # type: ignore[misc] # torchrec ships no types
    """torchrec's, of a compressed table."""

    tables: CompressedTables | None = None

    @classmethod
    def of(cls, info: EmbeddingShardingInfo, tables: CompressedTables) -> CompressedShardingInfo:
        """``info`` such that torchrec puts all compressed tables of a rank in one group.

        It groups tables by type, pooling and optimizer; the engine pools each as its own spec says, and looks
        tables that share an array up together. Of a table that is cut row-wise it is told the numbers that
        travel as if they were its rows.
        """
        config = replace(
            info.embedding_config, pooling=PoolingType.SUM, data_type=DataType.FP32, stash_weights=False
        )
        sharding = info.param_sharding
        if sharding.sharding_type == ROW_WISE:
            shards = sharding.sharding_spec.shards
            split = row_split(tables.specs[config.name], len(shards))
            assert split is not None, "check_plan lets no other pass"
            size = split.ids_per_rank
            config = replace(config, num_embeddings=size * len(shards))
            cut = [
                ShardMetadata([k * size, 0], [size, config.embedding_dim], shard.placement)
                for k, shard in enumerate(shards)
            ]
            sharding = replace(sharding, sharding_spec=EnumerableShardingSpec(cut))
        return cls(config, sharding, info.param, fused_params={}, tables=tables)


class Compressed:
    """What the shardings with compressed tables have in common: whose they are, and the look-up."""

    _grouped_embedding_configs: Any
    _env: ShardingEnv
    _device: torch.device | None
    held: Held

    def _hold(self, infos: Sequence[EmbeddingShardingInfo]) -> None:
        own = [info for info in infos if isinstance(info, CompressedShardingInfo)]
        plan = {info.embedding_config.name: info.param_sharding for info in own}
        tables, kind = own[0].tables, own[0].param_sharding.sharding_type
        assert tables is not None
        self.held = Held(tables, kind, plan, self._env.process_group)

    def create_lookup(
        self, device: torch.device | None = None, fused_params: Any = None, feature_processor: Any = None
    ) -> CompressedLookup:
        kind = self.held.kind
        return CompressedLookup(
            self.held,
            grouped_configs=self._grouped_embedding_configs,
            pg=self._env.process_group,
            device=device if device is not None else self._device,
            feature_processor=feature_processor,
            # Only gradients that come through an exchange of pooled rows are divided by the number of ranks.
            scale_weight_gradients=kind != DATA_PARALLEL,
            sharding_type=ShardingType.ROW_WISE if kind == ROW_WISE else None,
            env=self._env,
        )


class CompressedTwSharding(Compressed, TwPooledEmbeddingSharding):  # type: ignore[misc] # no types
    """Table-wise: each table on one rank."""

    def __init__(self, sharding_infos: Sequence[EmbeddingShardingInfo], *rest: Any, **named: Any) -> None:
        super().__init__(sharding_infos, *rest, **named)
        self._hold(sharding_infos)


class CompressedDpSharding(Compressed, DpPooledEmbeddingSharding):  # type: ignore[misc] # no types
    """Data-parallel: each table on every rank."""

    def __init__(self, sharding_infos: Sequence[EmbeddingShardingInfo], *rest: Any, **named: Any) -> None:
        super().__init__(sharding_infos, *rest, **named)
        self._hold(sharding_infos)


class CompressedRwSharding(Compressed, EvenRwSharding):
    """Row-wise: each rank has some rows of each table; the ranks' partial sums are added up."""

    def __init__(self, sharding_infos: Sequence[EmbeddingShardingInfo], *rest: Any, **named: Any) -> None:
        super().__init__(sharding_infos, *rest, **named)
        self._hold(sharding_infos)

    def create_input_dist(self, device: torch.device | None = None) -> _NumberedIds:
        tables = [
            table.name
            for group in self._grouped_embedding_configs
            for table in group.embedding_tables
            for _ in table.feature_names
        ]
        return _NumberedIds(
            self.held,
            tables,
            pg=self._pg,
            num_features=self._get_num_features(),
            feature_hash_sizes=self._get_feature_hash_sizes(),
            device=device if device is not None else self._device,
            is_sequence=False,
            has_feature_processor=self._has_feature_processor,
            need_pos=self._need_pos,
        )


class _NumberedIds(RwSparseFeaturesDist):  # type: ignore[misc] # torchrec ships no types
    """torchrec's exchange of ids, which go as the numbers that tell the rank they are for.

    Args:
        held: the compressed tables.
        tables: the table of each feature.
        arguments: torchrec's.
    """

    def __init__(self, held: Held, tables: Sequence[str], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._splits = [held.splits.get(table) for table in tables]

    def forward(self, sparse_features: KeyedJaggedTensor) -> Any:
        kjt = sparse_features
        pieces = kjt.values().split(kjt.length_per_key())
        numbers = torch.cat(
            [
                ids if split is None else split.number(ids.long()).to(ids.dtype)
                for ids, split in zip(pieces, self._splits, strict=True)
            ]
        )
        return super().forward(_with_values(kjt, numbers))


def compressed_sharding(
    infos: list[EmbeddingShardingInfo], env: ShardingEnv, device: torch.device | None, codecs: Any
) -> Any:
    """The sharding of tables of which at least one is compressed."""
    kind = infos[0].param_sharding.sharding_type
    if kind == DATA_PARALLEL:
        return CompressedDpSharding(infos, env, device)
    made = CompressedRwSharding if kind == ROW_WISE else CompressedTwSharding
    return made(infos, env, device, qcomm_codecs_registry=codecs)


def _with_values(kjt: KeyedJaggedTensor, values: Tensor) -> KeyedJaggedTensor:
    variable = kjt.variable_stride_per_key()
    return KeyedJaggedTensor(
        keys=kjt.keys(),
        values=values,
        weights=kjt.weights_or_none(),
        lengths=kjt.lengths(),
        stride=None if variable else kjt.stride(),
        stride_per_key_per_rank=kjt.stride_per_key_per_rank() if variable else None,
        inverse_indices=kjt.inverse_indices_or_none(),
    )
