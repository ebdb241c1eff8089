"""A rank's compressed tables as one of torchrec's grouped kernels, looked up by the house's engine."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding_kernel import BaseEmbedding
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, GroupedEmbeddingConfig
from torchrec.optim.fused import EmptyFusedOptimizer, FusedOptimizer, FusedOptimizerModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.backends import build
from recemb.backends.base import Backend
from recemb.bags import Bags
from recemb.engine import Engine
from recemb.errors import ConfigError
from recemb.torchrec_io.fused_optimizer import CollectionOptimizer
from recemb.torchrec_io.kjt import padded_offsets, state_of
from recemb.torchrec_io.sharding.held import Held
from recemb.torchrec_io.sharding.replicas import Replicas


class CompressedKernel(BaseEmbedding, FusedOptimizerModule):  # type: ignore[misc] # torchrec ships no types
    """The compressed tables of one rank, sharding type and slice: one call of the engine a batch.

    The optimizers attached to the collection step in the backward here; those of replicated parameters once
    their gradients have been exchanged.

    Args:
        config: torchrec's group; its tables' names and features are used.
        held: the compressed tables of this sharding type.
        device: where the parameters live.
    """

    def __init__(self, config: GroupedEmbeddingConfig, held: Held, device: torch.device | None) -> None:
        super().__init__()
        self._config = config
        specs, tables = held.specs([table.name for table in config.embedding_tables]), held.tables
        self.tables = nn.ModuleDict(build(specs, device or torch.device("cpu")))
        self._engine = Engine(specs, tables.micro_batch_rows)
        self.replicas = held.replicas(self.backends)
        parameters = dict(self.tables.named_parameters())
        lazy = {id(parameter) for parameter in stepped_lazily(self.backends, self.replicas)}
        for key, parameter in parameters.items():
            parameter.requires_grad_(key not in tables.frozen)
            if key in tables.attached:
                tables.attached[key].attach(parameter, id(parameter) in lazy)
        # A pipeline prepares the next batch before this one's backward; one more would never be looked up.
        self._ahead: deque[tuple[Tensor, Tensor | None, list[object], Bags]] = deque(maxlen=2)
        attached = any(key in tables.attached for key in parameters)
        self._optimizer = CollectionOptimizer(parameters, held.shown) if attached else EmptyFusedOptimizer()

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Look up and pool the bags of all ranks that reach this one.

        Args:
            features: one key per feature and table, in the order of the group's tables.

        Returns:
            [B, sum of D] float32 with B the samples of all ranks; under a variable batch size per feature a
            flat tensor, rank by rank and feature by feature in it, as torchrec's kernels give it.

        Raises:
            BatchError: names feature, table and value; the sample is counted over the ranks. No weight has
                changed.
        """
        variable = features.variable_stride_per_key()
        bags = self._taken(features)
        if bags is None or bags.prepared_outside:
            bags = self._bags(features)
        with self.replicas.exchanged():
            pooled = self._engine(self.backends, bags).float()
        return _by_rank(pooled, self._engine.dims, features) if variable else pooled

    def prefetch(self, features: KeyedJaggedTensor) -> None:
        """Prepare a batch for a :meth:`forward` to come, beside what runs now: check it, sort its ids.

        Raises:
            BatchError: as in the look-up.
        """
        weights = features.weights_or_none()
        if self._config.is_weighted and weights is None:
            # A feature processor makes them just before the look-up.
            return
        bags = self._bags(features)
        if self._engine.prefetch(self.backends, bags):
            self._ahead.append((features.values(), weights, state_of(features, cut=True), bags))

    def _bags(self, features: KeyedJaggedTensor) -> Bags:
        offsets = padded_offsets(features) if features.variable_stride_per_key() else features.offsets()
        weights = features.weights_or_none() if self._config.is_weighted else None
        return Bags(features.values().long(), offsets.long(), len(features.keys()), weights)

    def _taken(self, features: KeyedJaggedTensor) -> Bags | None:
        """The bags that have been prepared of this very batch; torchrec cuts a new object out each time."""
        values, weights = features.values(), features.weights_or_none()
        for at, (known, known_weights, state, bags) in enumerate(self._ahead):
            if _same_memory(known, values) and values.numel():
                del self._ahead[at]
                # A feature processor may have made other weights since.
                same = not self._config.is_weighted or _same_memory(known_weights, weights)
                return bags if same and state == state_of(features, cut=True) else None
        return None

    def __getattr__(self, name: str) -> Any:
        # Only the sharded ManagedCollisionEmbeddingBagCollection needs it of every kernel.
        if name == "_emb_module":
            raise no_managed_collisions(list(self.tables))
        return super().__getattr__(name)

    @property
    def backends(self) -> dict[str, Backend]:
        """The local tables, by name."""
        return dict(self.tables.items())  # type: ignore[arg-type] # ModuleDict knows modules only

    @property
    def config(self) -> GroupedEmbeddingConfig:
        return self._config

    @property
    def fused_optimizer(self) -> FusedOptimizer:
        return self._optimizer

    def state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Nothing: the sharded collection registers the parameters under torchrec's keys."""
        return OrderedDict() if destination is None else destination

    def named_parameters_by_table(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Nothing: torchrec would take each for the one ``weight`` of a table."""
        yield from ()

    def flush(self) -> None:
        """Nothing: cached rows are saved as they are."""

    def purge(self) -> None:
        """Nothing: cached rows are no copies of others."""


class CompressedLookup(GroupedPooledEmbeddingsLookup):  # type: ignore[misc] # torchrec ships no types
    """torchrec's lookup, with :class:`CompressedKernel` for the compressed tables.

    Args:
        held: the compressed tables of its sharding type.
        arguments: torchrec's.
    """

    def __init__(self, held: Held, **arguments: Any) -> None:
        # Before torchrec's own, which creates the kernels.
        self._held = held
        super().__init__(**arguments)

    @property
    def module(self) -> CompressedLookup:
        """Itself: torchrec takes it that replicated tables are wrapped in DDP, and unwraps them."""
        return self

    def _create_embedding_kernel(
        self, config: GroupedEmbeddingConfig, device: torch.device | None, *rest: Any, **named: Any
    ) -> BaseEmbedding:
        if config.compute_kernel == EmbeddingComputeKernel.CUSTOMIZED_KERNEL:
            return CompressedKernel(config, self._held, device)
        return super()._create_embedding_kernel(config, device, *rest, **named)

    def prefetch(self, sparse_features: KeyedJaggedTensor, forward_stream: Any = None) -> None:
        """What ``PrefetchTrainPipelineSparseDist`` calls with the next batch."""
        super().prefetch(sparse_features, forward_stream)
        groups = sparse_features.split(self._feature_splits)
        for kernel, features in zip(self._emb_modules, groups, strict=True):
            if isinstance(kernel, CompressedKernel):
                kernel.prefetch(features)

    def forward(self, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Pool the bags of every group: [B, sum of D], flat under a variable batch size per feature."""
        if not sparse_features.variable_stride_per_key() or len(self._emb_modules) < 2:
            pooled: Tensor = super().forward(sparse_features)
            return pooled
        # torchrec's way of merging groups hands kernels a buffer that only fbgemm's can write to.
        groups = sparse_features.split(self._feature_splits)
        pieces, ranks = [], 0
        for config, group, flat in zip(self.grouped_configs, groups, self._forward(groups), strict=True):
            by_rank = list(zip(*group.stride_per_key_per_rank(), strict=True))
            sizes = [
                sum(stride * dim for stride, dim in zip(strides, config.embedding_dims(), strict=True))
                for strides in by_rank
            ]
            ranks = len(by_rank)
            pieces.append(flat.reshape(-1).split(sizes))
        return torch.cat([piece[rank] for rank in range(ranks) for piece in pieces])


class _NoManagedCollisionsError(ConfigError, AttributeError):
    """Also for those of torchrec's modules that ask with ``hasattr``."""


def no_managed_collisions(names: Sequence[str]) -> ConfigError:
    """The error for compressed tables in torchrec's ``ManagedCollisionEmbeddingBagCollection``."""
    return _NoManagedCollisionsError(
        f"the compressed tables {list(names)} cannot be sharded inside a "
        "ManagedCollisionEmbeddingBagCollection, which draws rows anew when ids are evicted, and ids share "
        "the rows of these; give them compression=Dense(), or keep them in an EmbeddingBagCollection of "
        "their own and hash their ids into [0, num_embeddings) beforehand"
    )


def _same_memory(known: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are the same elements; ``known`` holds the memory, so its address tells."""
    if known is None or other is None:
        return known is other
    return known.data_ptr() == other.data_ptr() and known.shape == other.shape


def stepped_lazily(backends: Mapping[str, Backend], replicas: Replicas) -> Iterator[Tensor]:
    """The replicated parameters of which Adam moves the batch's rows alone, as a kernel would."""
    for name, param, parameter in replicas.named_parameters():
        if param not in backends[name].stepped_whole:
            yield parameter


def kernels_of(lookup: nn.Module) -> Iterator[CompressedKernel]:
    """The compressed tables' kernels of one of torchrec's look-ups, which may be wrapped in DDP."""
    inner: Any = lookup.module if isinstance(lookup, DistributedDataParallel) else lookup
    yield from (kernel for kernel in inner._emb_modules if isinstance(kernel, CompressedKernel))


def _by_rank(pooled: Tensor, dims: Sequence[int], features: KeyedJaggedTensor) -> Tensor:
    """[B, sum of D] with padded features -> flat: rank by rank, feature by feature, sample by sample."""
    strides = features.stride_per_key_per_rank()
    pieces = [
        torch.split(column[: sum(sizes)], list(sizes))
        for column, sizes in zip(torch.split(pooled, list(dims), dim=1), strides, strict=True)
    ]
    return torch.cat([piece[rank].reshape(-1) for rank in range(len(strides[0])) for piece in pieces])
