"""``ShardedEmbeddingBagCollection``: torchrec's sharded module, with compressed tables among its kernels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding_sharding import EmbeddingShardingInfo
from torchrec.distributed.embeddingbag import (
    ShardedEmbeddingBagCollection as TorchrecShardedEmbeddingBagCollection,
)
from torchrec.distributed.embeddingbag import _apply_mean_pooling, replace_placement_with_meta_device
from torchrec.distributed.types import ParameterSharding, ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingBagConfig as TorchrecEmbeddingBagConfig
from torchrec.optim.fused import EmptyFusedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from recemb.backends.base import Backend
from recemb.backends.memory import MemoryReport, memory_report
from recemb.bags import LookupTarget, LookupTargets
from recemb.cache.hot_rows import HotRowCache
from recemb.cache.metrics import CacheMetrics
from recemb.errors import ConfigError
from recemb.torchrec_io.configs import table_spec
from recemb.torchrec_io.embedding_bag_collection import (
    EmbeddingBagCollection,
    raise_what_is_pending,
    reset_tables,
)
from recemb.torchrec_io.kjt import check_kjt, check_weighted
from recemb.torchrec_io.loading import check_caches, empty_caches
from recemb.torchrec_io.sharding.even import EVEN
from recemb.torchrec_io.sharding.kernel import CompressedKernel, kernels_of
from recemb.torchrec_io.sharding.mean import SplitMeans
from recemb.torchrec_io.sharding.placement import check_environment, check_plan, customized, part_on
from recemb.torchrec_io.sharding.shardings import (
    Compressed,
    CompressedDpSharding,
    CompressedShardingInfo,
    compressed_sharding,
)
from recemb.torchrec_io.sharding.slices import check_slices, sliced, sliced_order
from recemb.torchrec_io.sharding.state import held_of, load_shards, save_shards
from recemb.torchrec_io.sharding.tables import CompressedTables, LogicalTables
from recemb.torchrec_io.stored_settings import check_settings, note_settings


class ShardedEmbeddingBagCollection(TorchrecShardedEmbeddingBagCollection):  # type: ignore[misc] # no types
    """What ``DistributedModelParallel`` makes of a :class:`recemb.EmbeddingBagCollection`.

    With B samples on a rank and table dimensions D_f, it maps each rank's ``KeyedJaggedTensor`` to that
    rank's ``KeyedTensor`` of values [B, sum of D_f]. Keys are the unsharded collection's, their order is
    torchrec's (by sharding type and slice, then by rank): select columns by name.

    Every rank checks its own batch before it sends anything: keys, lengths, weights and, of every table, ids.
    torchrec alone looks a bad id up in row 0 and trains it. On a GPU the host learns of a bad batch later;
    compressed tables are kept as they are until then, uncompressed ones follow torchrec. The other ranks,
    which wait for the batch that was refused, fail when the process group notices or times out. Weights that
    are missing are found at the look-up: in a ``FeatureProcessedEmbeddingBagCollection`` they are made there.

    A table with cached rows lies on one rank, which counts and exchanges rows over the look-ups of all ranks,
    as one device does of the whole batch; a cached row that has become NaN is found there
    (:class:`recemb.errors.NonFiniteError`), while the others wait as for a refused batch.

    Parameters start fresh, as torchrec's do: a module on the CPU or on ``meta`` gives its tables, not its
    weights; load its ``state_dict()`` for those. Weights on a GPU are taken over.

    Args:
        module: the collection.
        table_name_to_parameter_sharding: the plan, by table name.
        env: the ranks.
        fused_params: torchrec's, for the uncompressed tables.
        device: where parameters live.
        communication_slices: of the sharder.
        options: further arguments of torchrec's.

    Raises:
        ConfigError: a plan that compressed tables cannot follow, or functions in a cache's ``on_replace``,
            which would be lost; before anything is allocated.
    """

    _embedding_bag_configs: list[TorchrecEmbeddingBagConfig]
    _sharding_types: list[str]

    def __init__(
        self,
        module: EmbeddingBagCollection,
        table_name_to_parameter_sharding: Mapping[str, ParameterSharding],
        env: ShardingEnv,
        fused_params: dict[str, Any] | None = None,
        device: torch.device | None = None,
        *,
        communication_slices: int = 1,
        **options: Any,
    ) -> None:
        check_slices(communication_slices)
        tables = CompressedTables.of(module, device)
        configs = module.embedding_bag_configs()
        names = [config.name for config in configs]
        check_environment(env)
        check_plan(tables, names, table_name_to_parameter_sharding, env.world_size)
        _check_optimizers(tables, fused_params)
        _check_callbacks(module)
        plan = {
            name: customized(sharding) if name in tables.specs else sharding
            for name, sharding in table_name_to_parameter_sharding.items()
        }
        # Before torchrec's own, which asks for them.
        self._compressed = tables
        self._shards: dict[str, ShardedTensor] = {}
        order = options.get("sharded_module_order_overwrite")
        if order is not None:
            options["sharded_module_order_overwrite"] = sliced_order(order, communication_slices)
        logical = LogicalTables(module, tables, communication_slices)
        super().__init__(logical, plan, env, fused_params, device, **options)
        # torchrec reads them as its own sharding types.
        self._sharding_types = [kind.partition(":")[0] for kind in self._sharding_types]
        self._targets = _targets(module)
        self._means = SplitMeans(configs, plan)
        # By a batch's keys: where its features are, on the host and on the device.
        self._orders: dict[tuple[str, ...], tuple[list[int], Tensor]] = {}
        self._has_mean_pooling_callback = False
        if module.device.type not in ("meta", "cpu"):
            self.load_state_dict(module.state_dict(), strict=False)
        self._broadcast()

    def init_data_parallel(self) -> None:
        """Wrap replicated uncompressed tables in DDP; compressed ones exchange their gradients themselves."""
        for sharding, lookup in zip(self._embedding_shardings, self._lookups, strict=True):
            if not isinstance(sharding, CompressedDpSharding):
                continue
            own = {id(parameter) for kernel in kernels_of(lookup) for parameter in kernel.parameters()}
            names = [name for name, parameter in lookup.named_parameters() if id(parameter) in own]
            if len(names) == len(list(lookup.parameters())):
                # All tables that are replicated; DDP refuses a module that leaves it nothing to do.
                return
            # torch leaves this one untyped.
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
                lookup, names
            )
        super().init_data_parallel()

    @classmethod
    def create_grouped_sharding_infos(
        cls, module: LogicalTables, *rest: Any, **named: Any
    ) -> dict[str, list[EmbeddingShardingInfo]]:
        by_type: dict[str, list[EmbeddingShardingInfo]] = super().create_grouped_sharding_infos(
            module, *rest, **named
        )
        tables = module.tables
        own = {
            kind: [
                CompressedShardingInfo.of(info, tables)
                if info.embedding_config.name in tables.specs
                else info
                for info in infos
            ]
            for kind, infos in by_type.items()
        }
        return sliced(own, module.communication_slices, [peers for _, peers in tables.storages])

    @classmethod
    def create_embedding_bag_sharding(
        cls,
        sharding_infos: list[EmbeddingShardingInfo],
        env: ShardingEnv,
        device: torch.device | None = None,
        permute_embeddings: bool = False,
        qcomm_codecs_registry: Any = None,
    ) -> Any:
        compressed = any(isinstance(info, CompressedShardingInfo) for info in sharding_infos)
        even = EVEN.get(sharding_infos[0].param_sharding.sharding_type)
        if not compressed and even is None:
            return super().create_embedding_bag_sharding(
                sharding_infos, env, device, permute_embeddings, qcomm_codecs_registry
            )
        if device is not None and device.type == "meta":
            replace_placement_with_meta_device(sharding_infos)
        if not compressed and even is not None:
            return even(sharding_infos, env, device, qcomm_codecs_registry=qcomm_codecs_registry)
        return compressed_sharding(sharding_infos, env, device, qcomm_codecs_registry)

    def input_dist(self, ctx: Any, features: KeyedJaggedTensor) -> Any:
        """Check this rank's batch, then send its ids to the ranks that look them up.

        Weights may be missing: torchrec's feature processors make them between this and the look-up. Keys may
        come in any order and with others that no table has, anew in each batch.

        Raises:
            BatchError: names feature, table, sample and value. Nothing has been sent.
        """
        batch = maybe_td_to_kjt(features, None)
        check_kjt(batch, self._targets, self._is_weighted and batch.weights_or_none() is not None)
        if self._means:
            ctx.divisor = self._means.divisor(batch, self._embedding_names, self._embedding_dims)
        if not self._has_uninitialized_input_dist:
            self._find_features(batch.keys())
        sent = super().input_dist(ctx, batch)
        if ctx.inverse_indices is not None:
            ctx.inverse_indices = self._in_output_order(*ctx.inverse_indices)
        return sent

    def _find_features(self, keys: list[str]) -> None:
        """Set where torchrec finds a batch's features; it would look where those of the first one were."""
        known = self._orders.get(tuple(keys))
        if known is None:
            names = [name for sharding in self._embedding_shardings for name in sharding.feature_names()]
            order = [] if names == keys else [keys.index(name) for name in names]
            known = order, torch.tensor(order, device=self._device, dtype=torch.int32)
            self._orders[tuple(keys)] = known
        self._features_order, self._features_order_tensor = known
        self._has_features_permute = bool(known[0])

    def _in_output_order(self, names: list[str], bags: Tensor) -> tuple[list[str], Tensor]:
        """Inverse indices with a row for each block of columns that the ranks send back."""
        wanted = [name.partition("@")[0] for name in self._uncombined_embedding_names]
        if wanted == names:
            return names, bags
        order = torch.tensor([names.index(name) for name in wanted], device=bags.device)
        return wanted, bags.index_select(0, order)

    def _create_inverse_indices_permute_indices(self, inverse_indices: Any) -> None:
        """Nothing: torchrec would take the rows of each batch from where the first one had them."""

    def output_dist(self, ctx: Any, output: list[torch.Tensor]) -> Any:
        return self._mean(ctx, super().output_dist(ctx, output))

    def compute(self, ctx: Any, dist_input: Any) -> Any:
        self._check_weights(dist_input)
        return super().compute(ctx, dist_input)

    def compute_and_output_dist(self, ctx: Any, input: Any) -> Any:
        self._check_weights(input)
        return self._mean(ctx, super().compute_and_output_dist(ctx, input))

    def reset_parameters(self) -> None:
        """Draw fresh parameters for every table; replicated ones are rank 0's. Caches start empty."""
        every = self._embedding_bag_configs
        # torchrec's own looks for the one ``weight`` of each table.
        self._embedding_bag_configs = [
            config for config in every if config.name not in self._compressed.specs
        ]
        try:
            super().reset_parameters()
        finally:
            self._embedding_bag_configs = every
        if self._on_meta:
            return
        reset_tables(self._backends(), every)
        self._broadcast()

    def memory(self) -> MemoryReport:
        """The unsharded collection's :meth:`~recemb.EmbeddingBagCollection.memory` of what this rank holds.

        Tables of which it holds nothing are left out. Of one that is cut, rows, columns and uncompressed
        bytes are of the part that is looked up here (of a compressed one, rows to whole rows of its store),
        and bytes those stored here, with the parameter that every rank holds whole. A replicated table
        counts on every rank.
        """
        held = {name: backend.table for name, backend in self._backends().items()}
        for config in self._embedding_bag_configs:
            if config.name not in self._compressed.specs:
                plan = self.module_sharding_plan[config.name]
                part = part_on(self._env.rank, table_spec(config), plan)
                if part is not None:
                    held[config.name] = part
        return memory_report(
            [held[config.name] for config in self._embedding_bag_configs if config.name in held]
        )

    def hot_row_caches(self) -> dict[str, HotRowCache]:
        """The caches on this rank, by table name.

        A table with ``cache=HotRows(...)`` is on one rank with its cache; the other ranks have no entry for
        it. The ranks' dicts together are the unsharded collection's.
        """
        return {name: own.cache for name, own in self._backends().items() if own.cache is not None}

    def cache_metrics(self) -> dict[str, CacheMetrics]:
        """Figures of the caches on this rank, of look-ups by all ranks; no entry for other ranks' tables."""
        return {name: cache.metrics() for name, cache in self.hot_row_caches().items()}

    def update_shards(self, *args: Any, **named: Any) -> None:
        """Refused: compressed tables do not move while training.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "a collection with compressed tables cannot be resharded in place; save a checkpoint and load it "
            "under the new plan"
        )

    @property
    def unsharded_module_type(self) -> type[EmbeddingBagCollection]:
        return EmbeddingBagCollection

    def _initialize_torch_state(self, skip_registering: bool = False) -> None:
        super()._initialize_torch_state(skip_registering)
        self._register_compressed()
        if not skip_registering:
            self.register_state_dict_pre_hook(raise_what_is_pending)
            self._register_state_dict_hook(_after_state_dict)
            self._register_load_state_dict_pre_hook(_before_load, with_module=True)

    def _register_compressed(self) -> None:
        """Show the local tensors under torchrec's keys, and empty ones where another rank has them."""
        backends = self._backends().items()
        local = {
            f"{name}.{key}": tensor
            for name, backend in backends
            for key, tensor in backend.state_dict(keep_vars=True).items()
        }
        layouts = {
            key: layout
            for sharding in self._embedding_shardings
            if isinstance(sharding, Compressed)
            for key, layout in sharding.held.shards.items()
        }
        for key, whole in self._compressed.stored.items():
            own = local.get(key)
            _register(self.embedding_bags, key, self._placeholder(key, whole) if own is None else own)
            if key in layouts:
                # Not ``.data``: what is loaded into it has to count as written to the tensor itself.
                data = None if own is None else own.detach()
                self._shards[key] = layouts[key].tensor(data, whole.shape[1:], whole.dtype)

    def _placeholder(self, key: str, whole: Tensor) -> Tensor:
        if not isinstance(whole, nn.Parameter):
            return torch.empty(0, dtype=whole.dtype)
        empty = nn.Parameter(torch.empty(0), requires_grad=key not in self._compressed.frozen)
        if key in self._compressed.attached:
            # Keeps it out of the optimizer of the dense parameters on this rank, too.
            empty._in_backward_optimizers = [EmptyFusedOptimizer()]  # type: ignore[attr-defined]
        return empty

    def _kernels(self) -> Iterator[CompressedKernel]:
        for lookup in self._lookups:
            yield from kernels_of(lookup)

    def _backends(self) -> dict[str, Backend]:
        """This rank's compressed tables."""
        return {name: backend for kernel in self._kernels() for name, backend in kernel.backends.items()}

    def _broadcast(self) -> None:
        """What every rank holds whole takes rank 0's weights."""
        if not self._on_meta:
            for kernel in self._kernels():
                kernel.replicas.broadcast()

    @property
    def _on_meta(self) -> bool:
        return self._device is not None and self._device.type == "meta"

    def _check_weights(self, batches: Iterable[KeyedJaggedTensor]) -> None:
        """Here, not in the kernels: torchrec's own look a batch without weights up as if all were 1."""
        for batch in batches if self._is_weighted else ():
            check_weighted(batch)

    def _mean(self, ctx: Any, awaitable: Any) -> Any:
        if self._means:
            awaitable.callbacks.append(partial(_apply_mean_pooling, divisor=ctx.divisor))
        return awaitable


def _register(holder: nn.Module, key: str, tensor: Tensor) -> None:
    """Make ``tensor`` the parameter or buffer of a dotted key, in modules that are added where missing."""
    *path, name = key.split(".")
    for part in path:
        if not hasattr(holder, part):
            holder.add_module(part, nn.Module())
        holder = holder.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        holder.register_parameter(name, tensor)
    else:
        holder.register_buffer(name, tensor)


def _targets(module: EmbeddingBagCollection) -> LookupTargets:
    """Each feature with the smallest table it is looked up in."""
    found: dict[str, LookupTarget] = {}
    for config in module.embedding_bag_configs():
        for feature in table_spec(config).feature_names:
            known = found.get(feature)
            if known is None or config.num_embeddings < known.num_embeddings:
                found[feature] = LookupTarget(feature, config.name, config.num_embeddings)
    return LookupTargets(found.values())


def _check_optimizers(tables: CompressedTables, fused_params: Mapping[str, Any] | None) -> None:
    asked = sorted({"optimizer", "learning_rate"} & set(fused_params or ()))
    if not asked or not tables.specs:
        return
    owners = {peers[0].name for _, peers in tables.storages}
    bare = sorted(owners - {key.partition(".")[0] for key in tables.attached})
    if bare:
        raise ConfigError(
            f"fused_params of the sharder give {' and '.join(asked)}, which the tables {bare} would "
            "not follow; call apply_optimizer_in_backward(OptimizerClass, collection.parameters(), {...}) "
            "before DistributedModelParallel instead"
        )


def _check_callbacks(module: EmbeddingBagCollection) -> None:
    """They are of the caches that stay behind, and as a rule of an optimizer of their rows."""
    for name, cache in module.hot_row_caches().items():
        if cache.on_replace:
            raise ConfigError(
                f"table {name!r}: {len(cache.on_replace)} functions in on_replace of its cache would never "
                "be called: the sharded collection has caches of its own. Clear the list, and append to "
                "on_replace of the sharded collection's hot_row_caches() after DistributedModelParallel, "
                "with the optimizer made of its parameters"
            )


def _after_state_dict(
    module: ShardedEmbeddingBagCollection, destination: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    save_shards(destination, prefix, module._shards)
    note_settings(module._compressed.specs.values(), metadata)


def _before_load(
    module: ShardedEmbeddingBagCollection,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    *_: Any,
) -> None:
    tables = module._compressed.specs.values()
    check_settings(tables, state_dict, prefix, metadata)
    check_caches(tables, {key: held_of(value) for key, value in state_dict.items()}, prefix)
    load_shards(state_dict, prefix, module._shards)
    empty_caches(tables, module.hot_row_caches(), state_dict, prefix)
