"""torchrec's estimators of time and storage, corrected for compressed tables.

Communication, input and output of a compressed table are those of torchrec's formulas for its stand-in
(:class:`recemb.torchrec_io.sharding.tables.LogicalTables`); its parameters, optimizer state, gradients and
workspace are exact or bounded, and its compute is counted by method. Uncompressed tables are torchrec's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import nn
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    SharderDataMap,
    ShardEstimator,
    ShardingOption,
    Storage,
    StorageReservation,
    Topology,
)
from torchrec.distributed.planner.utils import get_num_poolings
from torchrec.distributed.types import ModuleSharder, PipelineType, ShardingType

from recemb.backends import storages
from recemb.cache.layout import buffer_bytes
from recemb.errors import ConfigError
from recemb.planner.costs import Costs
from recemb.planner.cpu_workspace import cpu_workspace
from recemb.planner.gpu_workspace import gpu_workspace
from recemb.planner.work import Load, forward_work, optimizer_bytes, parameter_bytes
from recemb.spec import Dense, TableSpec
from recemb.torchrec_io.embedding_bag_collection import EmbeddingBagCollection
from recemb.torchrec_io.sharding.held import DATA_PARALLEL, row_split
from recemb.torchrec_io.sharding.placement import ROWS_SPLIT
from recemb.torchrec_io.sharding.tables import CompressedTables
from recemb_kernels.digit_tree.group import MICRO_BATCH_ROWS as CPU_ROWS
from recemb_kernels.triton_frame import MICRO_BATCH_ROWS as GPU_ROWS

# Distinct rows whose products are held at once unless the collection says otherwise.
_MICRO_BATCH_ROWS = {"cpu": CPU_ROWS, "cuda": GPU_ROWS}

Constraints = Mapping[str, ParameterConstraints]


class Compressed:
    """The tables of modules that recemb's engine looks up, found once each.

    Args:
        device: where the tables will live, ``cpu`` or ``cuda``.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._known: dict[int, tuple[nn.Module, dict[str, list[TableSpec]], int | None]] = {}

    def peers(self, module: nn.Module, name: str) -> list[TableSpec] | None:
        """The tables that share a table's storage, the one that holds it first; ``None`` uncompressed."""
        return self._of(module)[1].get(name)

    def tables(self, module: nn.Module) -> list[TableSpec]:
        """All of a module."""
        return [spec_of(shared, name) for name, shared in self._of(module)[1].items()]

    def micro_batch_rows(self, module: nn.Module) -> int | None:
        """As given to the collection."""
        return self._of(module)[2]

    def _of(self, module: nn.Module) -> tuple[nn.Module, dict[str, list[TableSpec]], int | None]:
        if id(module) not in self._known:
            peers: dict[str, list[TableSpec]] = {}
            rows = None
            if isinstance(module, EmbeddingBagCollection):
                tables = CompressedTables.of(module, self._device)
                rows = tables.micro_batch_rows
                peers = {
                    table.name: shared for _, shared in storages(tables.specs.values()) for table in shared
                }
            # The module is kept, so that its id is not given to another.
            self._known[id(module)] = module, peers, rows
        return self._known[id(module)]


def spec_of(peers: Sequence[TableSpec], name: str) -> TableSpec:
    """The table of a name among those that share its storage."""
    return next(table for table in peers if table.name == name)


def row_parts(kind: str, topology: Topology) -> int:
    """Over how many ranks a sharding type cuts the rows of a table."""
    if kind == ShardingType.ROW_WISE.value:
        return int(topology.world_size)
    return int(topology.intra_group_size) if kind in ROWS_SPLIT else 1


class _Lookups:
    """Ids and bags that a shard of an option looks up in a step."""

    def __init__(self, option: ShardingOption, topology: Topology, constraints: Constraints | None) -> None:
        given = (constraints or {}).get(option.name)
        poolings = get_num_poolings(constraints, option)
        sizes = given.batch_sizes if given and given.batch_sizes else [option.batch_size] * option.num_inputs
        batches = list(zip(option.input_lengths, poolings, sizes, strict=True))
        ids = float(sum(length * times * size for length, times, size in batches))
        bags = float(sum(min(1.0, length) * times * size for length, times, size in batches))
        kind = option.sharding_type
        # A data-parallel shard sees its rank's batch; a table-wise one every rank's; a part of the rows that
        # part of every rank's ids, and every bag.
        self.bags = bags * (1 if kind == DATA_PARALLEL else topology.world_size)
        self.ids = ids if kind == DATA_PARALLEL else ids * topology.world_size / row_parts(kind, topology)


class PerfEstimator(ShardEstimator):  # type: ignore[misc] # torchrec ships no types
    """Milliseconds of each shard: torchrec's, with the compute of compressed tables in its place.

    Args:
        costs: constants with their origins.
        compressed: shared with the storage estimator.
    """

    def __init__(
        self,
        topology: Topology,
        constraints: Constraints | None = None,
        *,
        costs: Costs,
        compressed: Compressed,
    ) -> None:
        self._inner = EmbeddingPerfEstimator(topology=topology, constraints=constraints)
        self._topology, self._constraints = topology, constraints
        self._costs, self._compressed = costs, compressed

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap) -> None:
        """Fill in ``perf`` of every shard."""
        self._estimate_alike(sharding_options, sharder_data_map)
        for option in sharding_options:
            peers = self._compressed.peers(option.module[1], option.name)
            if peers is None:
                continue
            table = spec_of(peers, option.name)
            if isinstance(table.compression, Dense):
                continue
            lookups = _Lookups(option, self._topology, self._constraints)
            work = forward_work(table, lookups.ids, lookups.bags, self._costs["id_skew"])
            forward = self._costs.forward_ms(table.compression.method, work)
            for shard in option.shards:
                shard.perf.fwd_compute = forward
                shard.perf.bwd_compute = forward * self._costs[f"{table.compression.method}_backward"]

    def _estimate_alike(self, options: list[ShardingOption], sharder_data_map: SharderDataMap) -> None:
        """torchrec's estimate, once for options that it cannot tell apart.

        Its time of a shard depends on rows only where gradients of whole tables are exchanged
        (data-parallel) or a cache's statistics are given.
        """
        # Before torchrec's estimate, which writes options' ``is_weighted``, a part of their kind.
        kinds = [self._kind(option) for option in options]
        first: dict[Hashable, ShardingOption] = {}
        for kind, option in zip(kinds, options, strict=True):
            first.setdefault(kind, option)
        self._inner.estimate(list(first.values()), sharder_data_map)
        for kind, option in zip(kinds, options, strict=True):
            like = first[kind]
            if like is not option:
                option.is_weighted = like.is_weighted
                for shard, known in zip(option.shards, like.shards, strict=True):
                    shard.perf = copy.copy(known.perf)

    def _kind(self, option: ShardingOption) -> Hashable:
        rows_count = option.sharding_type == DATA_PARALLEL or option.cache_params is not None
        given = (self._constraints or {}).get(option.name)
        return (
            option.module_type_key,
            option.sharding_type,
            option.compute_kernel,
            tuple(tuple(shard.size) if rows_count else shard.size[1] for shard in option.shards),
            option.tensor.dtype,
            tuple(option.tensor.shape) if rows_count else None,
            option.batch_size,
            tuple(option.input_lengths),
            None if given is None else (tuple(given.num_poolings or ()), tuple(given.batch_sizes or ())),
            None if given is None else given.is_weighted,
            option.is_weighted,
            option.has_feature_processor,
            option.is_pooled,
            option.output_dtype,
            option.name if option.cache_params is not None else None,
        )


class StorageEstimator(ShardEstimator):  # type: ignore[misc] # torchrec ships no types
    """Bytes of each shard: torchrec's, with parameters, state and gradients of compressed tables.

    Their workspace is one a rank, whatever lies on it: :class:`WorkspaceReservation` keeps it free.

    Args:
        pipeline_type: the pipeline that trains, whose batches in flight are counted; torchrec's meaning.
        compressed: shared with the perf estimator.
    """

    def __init__(
        self,
        topology: Topology,
        constraints: Constraints | None = None,
        pipeline_type: PipelineType = PipelineType.NONE,
        *,
        compressed: Compressed,
    ) -> None:
        self._inner = EmbeddingStorageEstimator(
            topology=topology, constraints=constraints, pipeline_type=pipeline_type
        )
        self._topology, self._constraints, self._compressed = topology, constraints, compressed

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap) -> None:
        """Fill in ``storage`` of every shard."""
        self._inner.estimate(sharding_options, sharder_data_map)
        for option in sharding_options:
            peers = self._compressed.peers(option.module[1], option.name)
            if peers is not None:
                self._correct(option, peers)

    def _correct(self, option: ShardingOption, peers: list[TableSpec]) -> None:
        """The stand-in's bytes out, the table's in; torchrec's input and output buffers stay."""
        table = spec_of(peers, option.name)
        optimizer = optimizer_name(option.tensor)
        owner = table.name == peers[0].name
        own = _stored(peers, optimizer) if owner else 0
        # Ranks get equal blocks of rows, of which the first is never the smallest.
        parts = split_tables(table, option.sharding_type, row_parts(option.sharding_type, self._topology))
        if owner and option.sharding_type == DATA_PARALLEL:
            # A gradient as large as the parameters, and DDP's bucket for it.
            own += 2 * parameter_bytes(peers)
        stand_in = option.tensor.numel() * option.tensor.element_size()
        for shard in option.shards:
            part = math.prod(shard.size) / option.tensor.numel()
            bytes_in = own if parts is None else _stored([parts[0]], optimizer)
            whole = option.sharding_type == DATA_PARALLEL
            counted = stand_in if whole else math.ceil(stand_in * part)
            counted += math.ceil(counted * _state_share(option.tensor))
            extra = bytes_in - counted
            storage = shard.storage
            if self._topology.compute_device == "cuda":
                shard.storage = Storage(max(0, storage.hbm + extra), storage.ddr, storage.ssd)
            else:
                shard.storage = Storage(storage.hbm, max(0, storage.ddr + extra), storage.ssd)


class WorkspaceReservation(StorageReservation):  # type: ignore[misc] # torchrec ships no types
    """Another reservation, its part of DDR too, and the workspace in which compressed tables are looked up.

    On a CPU tables take turns in it, so it is the largest that any one needs, were all its ids distinct. On a
    GPU it is what the kernels hold of a whole step, of one shape of batch
    (:func:`recemb.planner.gpu_workspace.gpu_workspace`): each further shape that recurs, evaluation's say, is
    captured with as much again, from what the other reservation keeps free.

    Args:
        inner: torchrec's reservation.
        compressed: shared with the estimators.

    Attributes:
        workspace: bytes on each rank, known after :meth:`reserve`.
    """

    def __init__(self, inner: StorageReservation, compressed: Compressed) -> None:
        self._inner, self._compressed = inner, compressed
        self._reserved: Topology | None = None
        self._percentage = getattr(inner, "_percentage", None)
        self.workspace = 0

    def reserve(
        self,
        topology: Topology,
        batch_size: int,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]],
        constraints: dict[str, ParameterConstraints] | None = None,
    ) -> Topology:
        """The topology with what is left on each rank."""
        reserved: Topology = self._inner.reserve(topology, batch_size, module, sharders, constraints)
        device = topology.compute_device
        self.workspace = 0
        for child in module.modules():
            rows = self._compressed.micro_batch_rows(child) or _MICRO_BATCH_ROWS[device]
            loads, tables = [], self._compressed.tables(child)
            for table in tables:
                if isinstance(table.compression, Dense):
                    continue
                given = (constraints or {}).get(table.name)
                bags = float(batch_size * topology.world_size * len(table.feature_names))
                loads.append(Load(table, bags * max(given.pooling_factors if given else [1.0]), bags))
            weighted = isinstance(child, EmbeddingBagCollection) and bool(child.is_weighted())
            if device == "cuda":
                # Collections' forwards all come before their backwards, and graphs share no memory.
                self.workspace += gpu_workspace(loads, topology.world_size, rows, weighted=weighted)
                continue
            self.workspace += cpu_workspace(loads, len(tables) - len(loads), rows, weighted=weighted)
        for rank in reserved.devices:
            # torchrec keeps its part of HBM free, and none of DDR, in which the tables of a CPU lie.
            if self._percentage is not None:
                rank.storage.ddr = int((1 - self._percentage) * rank.storage.ddr)
            if device == "cuda":
                rank.storage.hbm -= self.workspace
            else:
                rank.storage.ddr -= self.workspace
        self._reserved = reserved
        return reserved

    @property
    def last_reserved_topology(self) -> Topology | None:
        """What :meth:`reserve` returned last, a copy."""
        return copy.deepcopy(self._reserved)


def split_tables(table: TableSpec, kind: str, ranks: int) -> Sequence[TableSpec] | None:
    """Each rank's table of a compressed one that is cut by rows; ``None`` when it cannot be cut so."""
    if kind not in ROWS_SPLIT:
        return None
    try:
        split = row_split(table, ranks)
    except ConfigError:
        # Too few rows for so many ranks.
        return None
    return None if split is None else split.tables


def _stored(peers: list[TableSpec], optimizer: str | None) -> int:
    """Bytes of parameters, with what caches keep beside theirs, and of optimizer state."""
    return parameter_bytes(peers) + sum(map(buffer_bytes, peers)) + optimizer_bytes(peers, optimizer)


def optimizer_name(tensor: torch.Tensor) -> str | None:
    """The class of the optimizer that ``apply_optimizer_in_backward`` attached, by name."""
    attached = getattr(tensor, "_optimizer_classes", None)
    return attached[0].__name__ if attached else None


def _state_share(tensor: torch.Tensor) -> float:
    """What torchrec adds to a tensor's bytes for its optimizer's state, as a part of them."""
    name = optimizer_name(tensor)
    if name is None or name == "SGD":
        return 0.0
    if name == "RowWiseAdagrad":
        return 1 / tensor.shape[-1]
    return 2.0 if name == "Adam" else 1.0
