"""The sharder of :class:`recemb.EmbeddingBagCollection` for ``DistributedModelParallel``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionSharder as TorchrecEmbeddingBagCollectionSharder,
)
from torchrec.distributed.embeddingbag import (
    ShardedEmbeddingBagCollection as TorchrecShardedEmbeddingBagCollection,
)
from torchrec.distributed.fp_embeddingbag import FeatureProcessedEmbeddingBagCollectionSharder
from torchrec.distributed.mc_embeddingbag import ManagedCollisionEmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.types import ModuleSharder, ParameterSharding, ShardingEnv
from torchrec.modules.embedding_modules import EmbeddingBagCollection as TorchrecEmbeddingBagCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection

from recemb.errors import ConfigError
from recemb.torchrec_io.embedding_bag_collection import EmbeddingBagCollection
from recemb.torchrec_io.sharding.kernel import no_managed_collisions
from recemb.torchrec_io.sharding.module import ShardedEmbeddingBagCollection
from recemb.torchrec_io.sharding.slices import check_slices
from recemb.torchrec_io.sharding.tables import CompressedTables, LogicalTables


class EmbeddingBagCollectionSharder(TorchrecEmbeddingBagCollectionSharder):  # type: ignore[misc] # no types
    """Shards :class:`recemb.EmbeddingBagCollection`, as torchrec's class of this name shards torchrec's.

    A compressed table is planned table-wise (whole, on one rank) or data-parallel (on every rank, gradients
    averaged); one with a store of rows (quotient-remainder, mixed dimensions) row-wise too, its longer
    parameter cut over the ranks. One with cached rows is planned table-wise, and its cache lies with it.
    Tables that share a ROBE array lie on one rank or are all data-parallel. Uncompressed tables take every
    plan and kernel of torchrec's.

    Ranks' batches may differ in size, or be empty. On gloo, where torchrec's exchanges of tables that are cut
    by rows take equal ones alone, pooled rows travel with zeros up to the largest batch.

    An optimizer that ``apply_optimizer_in_backward`` attached before steps on compressed tables however they
    are planned: fused into the backward, or, on what every rank holds whole, once its gradient has been
    exchanged there (Adam is lazy there too: rows whose gradient is 0 throughout stay). torchrec does not let
    it act on data-parallel uncompressed tables: those are for the optimizer of the dense layers.

    Args:
        fused_params, qcomm_codecs_registry, sharded_module_order_overwrite: torchrec's; ``fused_params`` are
            of the uncompressed tables.
        communication_slices: 1 looks all tables up and then sends their rows. With 2 and more, table-wise
            and row-wise tables are looked up slice by slice; meanwhile the rows of the slice before travel,
            and in the backward the gradients of the slices to come. The numbers stay the same (sums of
            row-wise tables over three ranks and more to a rounding), their keys come in another order, and
            ``fused_optimizer`` has groups for each slice. Each costs its calls and messages, on every rank:
            worth it where the links take longer than those. Alike on every rank.

    Raises:
        ConfigError: fewer than one slice.

    Example::

        apply_optimizer_in_backward(torch.optim.Adagrad, model.ebc.parameters(), {"lr": 0.01})
        model = DistributedModelParallel(model, plan=plan, sharders=get_sharders())
        dense = KeyedOptimizerWrapper(
            dict(in_backward_optimizer_filter(model.named_parameters())), lambda ps: torch.optim.Adam(ps)
        )
        optimizer = CombinedOptimizer([model.fused_optimizer, dense])
    """

    def __init__(self, *arguments: Any, communication_slices: int = 1, **named: Any) -> None:
        check_slices(communication_slices)
        super().__init__(*arguments, **named)
        self._communication_slices = communication_slices

    def shard(
        self,
        module: TorchrecEmbeddingBagCollection,
        params: Mapping[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> TorchrecShardedEmbeddingBagCollection:
        """The sharded module, on each rank.

        One of torchrec's own becomes torchrec's: a sharder that holds this one, as that of
        ``FeatureProcessedEmbeddingBagCollection`` does, gives it every collection.

        Raises:
            ConfigError: a plan that compressed tables cannot follow, before anything is allocated.
        """
        if not isinstance(module, EmbeddingBagCollection):
            return super().shard(module, params, env, device, module_fqn)
        return ShardedEmbeddingBagCollection(
            module,
            params,
            env,
            self.fused_params,
            device,
            communication_slices=self._communication_slices,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
            sharded_module_order_overwrite=self._sharded_module_order_overwrite,
        )

    def shardable_parameters(self, module: TorchrecEmbeddingBagCollection) -> dict[str, nn.Parameter]:
        """Table name -> a 2-D weight; for a compressed table a stand-in of its bytes and its D columns."""
        if not isinstance(module, EmbeddingBagCollection):
            weights: dict[str, nn.Parameter] = super().shardable_parameters(module)
            return weights
        return LogicalTables(module, CompressedTables.of(module)).for_planner()

    def reshard(self, *args: object, **named: object) -> ShardedEmbeddingBagCollection:
        """Refused.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "a collection with compressed tables cannot be resharded in place; save a checkpoint and load it "
            "under the new plan"
        )

    @property
    def module_type(self) -> type[EmbeddingBagCollection]:
        return EmbeddingBagCollection

    @property
    def sharded_module_type(self) -> type[ShardedEmbeddingBagCollection]:
        return ShardedEmbeddingBagCollection


class _ManagedCollisions(ManagedCollisionEmbeddingBagCollectionSharder):  # type: ignore[misc] # no types
    """torchrec's, which refuses compressed tables before they are planned."""

    def shard(
        self, module: ManagedCollisionEmbeddingBagCollection, *arguments: Any, **named: Any
    ) -> nn.Module:
        _check_managed_collisions(module)
        sharded: nn.Module = super().shard(module, *arguments, **named)
        return sharded

    def shardable_parameters(self, module: ManagedCollisionEmbeddingBagCollection) -> dict[str, nn.Parameter]:
        _check_managed_collisions(module)
        weights: dict[str, nn.Parameter] = super().shardable_parameters(module)
        return weights


def _check_managed_collisions(module: ManagedCollisionEmbeddingBagCollection) -> None:
    inner = module._embedding_module
    specs = CompressedTables.of(inner).specs if isinstance(inner, EmbeddingBagCollection) else {}
    if specs:
        raise no_managed_collisions(list(specs))


def get_sharders(communication_slices: int = 1) -> list[ModuleSharder[nn.Module]]:
    """torchrec's default sharders and recemb's: ``DistributedModelParallel(model, sharders=get_sharders())``.

    torchrec looks sharders up by a module's exact type: with its defaults alone, or without a plan for it, a
    :class:`recemb.EmbeddingBagCollection` is replicated on every rank, and warns at its first look-up. The
    sharder of ``FeatureProcessedEmbeddingBagCollection`` takes recemb's collections and torchrec's.

    Args:
        communication_slices: of :class:`EmbeddingBagCollectionSharder`.
    """
    own = EmbeddingBagCollectionSharder(communication_slices=communication_slices)
    around = {
        FeatureProcessedEmbeddingBagCollectionSharder: FeatureProcessedEmbeddingBagCollectionSharder(own),
        ManagedCollisionEmbeddingBagCollectionSharder: _ManagedCollisions(own),
    }
    return [*(around.get(type(sharder), sharder) for sharder in get_default_sharders()), own]
