"""torchrec's options for every table, with equal shards estimated once.

torchrec's own enumerator makes and estimates a shard for every rank of every row-wise and data-parallel
option: 4 million of them for 1,000 tables on 1,024 ranks. Here such an option keeps one shard of each size
(at most three), which loses nothing, since an estimate depends on a shard by its size alone; and tables that
no estimate can tell apart are estimated once.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.enumerators import (
    EmbeddingEnumerator,
    _extract_constraints_for_param,
    get_partition_by_type,
)
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    PartitionByType,
    Shard,
    ShardEstimator,
    ShardingOption,
    Topology,
)
from torchrec.distributed.planner.utils import build_sharder_data_map, sharder_name
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets
from torchrec.distributed.types import ModuleSharder, ShardingType

from recemb.errors import ConfigError
from recemb.planner.layout import Ints
from recemb.spec import TableSpec
from recemb.torchrec_io.planning.estimators import (
    Compressed,
    optimizer_name,
    row_parts,
    spec_of,
    split_tables,
)
from recemb.torchrec_io.sharding.placement import sharding_types

# Of options that cost the same the simplest is kept: column-wise shards as wide as the table are table-wise.
_SIMPLEST = [
    ShardingType.TABLE_WISE.value,
    ShardingType.DATA_PARALLEL.value,
    ShardingType.COLUMN_WISE.value,
    ShardingType.ROW_WISE.value,
    ShardingType.TABLE_ROW_WISE.value,
    ShardingType.TABLE_COLUMN_WISE.value,
    ShardingType.GRID_SHARD.value,
]
_OWN_KERNELS = {EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.DENSE.value}


class EveryRank(Sequence[Shard]):
    """The shards of an option that has one on every rank: shard r lies on rank r.

    Read-only: shards are made when asked for, from one shard of each size.

    Attributes:
        distinct: one shard of each size, whose estimates stand for all of that size.
        which: [W] which of ``distinct`` a rank's shard equals.
    """

    def __init__(self, sizes: list[list[int]], offsets: list[list[int]]) -> None:
        rows, self.which = np.unique([size[0] for size in sizes], return_inverse=True)
        first = [int(np.flatnonzero(self.which == k)[0]) for k in range(len(rows))]
        self.distinct = [Shard(size=list(sizes[k]), offset=list(offsets[k])) for k in first]
        self._starts: Ints = np.asarray([offset[0] for offset in offsets], np.int64)

    def with_own_estimates(self) -> EveryRank:
        """The same sizes with shards that can be estimated apart."""
        twin = copy.copy(self)
        twin.distinct = [Shard(size=shard.size, offset=shard.offset) for shard in self.distinct]
        return twin

    @overload
    def __getitem__(self, index: int) -> Shard: ...
    @overload
    def __getitem__(self, index: slice) -> list[Shard]: ...
    def __getitem__(self, index: int | slice) -> Shard | list[Shard]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        like = self.distinct[self.which[index]]
        rank = index % len(self)
        return Shard(like.size, [int(self._starts[rank]), 0], like.storage, like.perf, rank)

    def __len__(self) -> int:
        return len(self.which)

    def __iter__(self) -> Iterator[Shard]:
        return (self[k] for k in range(len(self)))

    def __deepcopy__(self, memo: object) -> EveryRank:
        return self


def distinct_shards(option: ShardingOption) -> list[Shard]:
    """Shards whose estimates stand for all of the option's."""
    shards = option.shards
    return shards.distinct if isinstance(shards, EveryRank) else list(shards)


class PlanEnumerator(EmbeddingEnumerator):  # type: ignore[misc] # torchrec ships no types
    """torchrec's enumerator; compressed tables get the options that recemb can run.

    Args:
        topology, batch_size, constraints, estimator: torchrec's.
        compressed: shared with the estimators.
    """

    def __init__(
        self,
        topology: Topology,
        batch_size: int,
        constraints: Mapping[str, ParameterConstraints] | None,
        estimator: list[ShardEstimator],
        compressed: Compressed,
    ) -> None:
        super().__init__(topology, batch_size, constraints, estimator)
        self._topology = topology
        self._compressed = compressed

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        """All options of all tables, estimated.

        Raises:
            ConfigError: a compressed table that cannot be sharded, or not as constrained.
        """
        self._sharder_map = {sharder_name(sharder.module_type): sharder for sharder in sharders}
        self._sharder_data_map = build_sharder_data_map(self._sharder_map)
        options: list[ShardingOption] = []
        queue: list[tuple[str, nn.Module]] = [("", module)]
        while queue:
            path, child = queue.pop()
            sharder = self._sharder_map.get(sharder_name(type(child)))
            if sharder is None:
                queue += [
                    (f"{path}.{name}" if path else name, inner) for name, inner in child.named_children()
                ]
                continue
            pooled = ShardingOption.module_pooled(child, path)
            for name, weight in sharder.shardable_parameters(child).items():
                options += self._of_table(path, child, name, weight, sharder, pooled)
        self._estimate(options)
        self._last_stored_search_space = options
        return options

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        """Estimate options again, as proposers that change them ask for."""
        representatives = []
        for option in sharding_options:
            twin = copy.copy(option)
            twin.shards = list({tuple(shard.size): shard for shard in distinct_shards(option)}.values())
            representatives.append(twin)
        super().populate_estimates(representatives)
        for option, twin in zip(sharding_options, representatives, strict=True):
            option.is_weighted = twin.is_weighted
            known = {tuple(shard.size): shard for shard in twin.shards}
            for shard in distinct_shards(option):
                like = known[tuple(shard.size)]
                shard.storage, shard.perf = like.storage, like.perf

    def _of_table(
        self,
        path: str,
        module: nn.Module,
        name: str,
        weight: nn.Parameter,
        sharder: ModuleSharder[nn.Module],
        pooled: bool,
    ) -> list[ShardingOption]:
        given = _extract_constraints_for_param(self._constraints, name)
        lengths, width, cache, hbm, rounding, bounds, features, output, group, key_value = given
        if group and group != self._compute_device:
            return []
        key = sharder_name(type(module))
        peers = self._compressed.peers(module, name)
        allowed = list(sharder.sharding_types(self._compute_device))
        if peers is not None and self._compute_device == "cpu":
            # torchrec cuts rows on GPUs only.
            allowed.append(ShardingType.ROW_WISE.value)
        kinds = self._filter_sharding_types(name, allowed, key)
        if peers is not None:
            kinds = self._own_kinds(spec_of(peers, name), kinds)
        made, splits = [], {}
        for kind in sorted(kinds, key=_SIMPLEST.index):
            kernels = self._filter_compute_kernels(
                name, sharder.compute_kernels(kind, self._compute_device), kind
            )
            if peers is not None:
                kernels = [kernel for kernel in kernels if kernel in _OWN_KERNELS]
            if kind not in splits:
                splits[kind] = self._split(weight, kind, width, self._get_num_buckets(name, module))
            for kernel in sorted(kernels):
                made.append(
                    ShardingOption(
                        name=name,
                        tensor=weight,
                        module=(path, module),
                        input_lengths=lengths,
                        batch_size=self._batch_size,
                        compute_kernel=kernel,
                        sharding_type=kind,
                        partition_by=get_partition_by_type(kind),
                        shards=_fresh(splits[kind]),
                        cache_params=cache,
                        enforce_hbm=hbm,
                        stochastic_rounding=rounding,
                        bounds_check_mode=bounds,
                        dependency=None if peers is None else _together(path, peers),
                        is_pooled=pooled,
                        feature_names=features,
                        output_dtype=output,
                        key_value_params=key_value,
                    )
                )
        if not made:
            raise ConfigError(
                f"table {name!r}: no sharding type and kernel are left by its ParameterConstraints on "
                f"{self._compute_device}; {key} allows {allowed}"
            )
        return made

    def _own_kinds(self, table: TableSpec, allowed: Sequence[str]) -> list[str]:
        """The sharding types for a compressed table, of those that constraints and sharder allow."""
        own = sharding_types(table)
        kinds = [kind for kind in allowed if kind in own and self._can_be_cut(table, kind)]
        if not kinds:
            raise ConfigError(
                f"table {table.name!r} ({table.compression}) can be planned {' or '.join(own)}, and its "
                f"ParameterConstraints leave {', '.join(allowed) or 'nothing'} on "
                f"{self._world_size} ranks; leave sharding_types out, or name one of {list(own)}"
            )
        return kinds

    def _can_be_cut(self, table: TableSpec, kind: str) -> bool:
        parts = row_parts(kind, self._topology)
        return parts == 1 or split_tables(table, kind, parts) is not None

    def _split(
        self, weight: nn.Parameter, kind: str, width: int | None, buckets: int | None
    ) -> list[Shard] | EveryRank:
        sizes, offsets = calculate_shard_sizes_and_offsets(
            tensor=weight,
            world_size=self._world_size,
            local_world_size=self._local_world_size,
            sharding_type=kind,
            col_wise_shard_dim=width,
            device_memory_sizes=self._device_memory_sizes,
            num_buckets=buckets,
        )
        if get_partition_by_type(kind) == PartitionByType.UNIFORM.value:
            return EveryRank(sizes, offsets)
        return [Shard(size=size, offset=offset) for size, offset in zip(sizes, offsets, strict=True)]

    def _estimate(self, options: Sequence[ShardingOption]) -> None:
        """Estimate one option of each kind that the estimators can tell apart; others share the result."""
        first: dict[Hashable, ShardingOption] = {}
        for option in options:
            first.setdefault(self._kind(option), option)
        self.populate_estimates(list(first.values()))
        for option in options:
            like = first[self._kind(option)]
            if like is option:
                continue
            option.is_weighted = like.is_weighted
            for shard, known in zip(distinct_shards(option), distinct_shards(like), strict=True):
                shard.storage, shard.perf = known.storage, known.perf

    def _kind(self, option: ShardingOption) -> Hashable:
        weight: torch.Tensor = option.tensor
        constraints: Any = (self._constraints or {}).get(option.name)
        peers = self._compressed.peers(option.module[1], option.name)
        return (
            id(option.module[1]),
            tuple(weight.shape),
            weight.dtype,
            optimizer_name(weight),
            option.sharding_type,
            option.compute_kernel,
            hash(constraints),
            option.has_feature_processor,
            # Names tell apart tables of one array, whose first holds it, and nothing else.
            None if peers is None else _anonymous(spec_of(peers, option.name), peers),
        )


def _anonymous(table: TableSpec, peers: Sequence[TableSpec]) -> Hashable:
    if len(peers) > 1:
        return table.name
    return table.num_embeddings, table.embedding_dim, table.dtype, table.compression


def _together(path: str, peers: Sequence[TableSpec]) -> str | None:
    """What tables that share an array have in common; ``None`` for a table alone."""
    return f"{path}:{peers[0].name}" if len(peers) > 1 else None


def _fresh(shards: list[Shard] | EveryRank) -> list[Shard] | EveryRank:
    if isinstance(shards, EveryRank):
        return shards.with_own_estimates()
    return [Shard(size=shard.size, offset=shard.offset) for shard in shards]
