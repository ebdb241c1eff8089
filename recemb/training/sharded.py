"""A model whose tables are spread over the ranks: its plan, its weights at the start, its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    ParameterShardingGenerator,
    construct_module_sharding_plan,
    table_wise,
)
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    ParameterSharding,
    ShardingEnv,
    ShardingPlan,
)
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from recemb.backends import storages
from recemb.data.click_log import ClickLog
from recemb.errors import ConfigError
from recemb.optim.attached import attached_to
from recemb.planner.budget import BudgetedTables
from recemb.torchrec_io import EmbeddingBagCollectionSharder, get_sharders, load_plan
from recemb.torchrec_io.embedding_bag_collection import EmbeddingBagCollection
from recemb.training.config import RunConfig
from recemb.training.distributed import World
from recemb.training.optimizer_state import column_shards
from recemb.training.setup import build_model, optimizer_settings
from recemb.training.table_step import find_collection, table_step


def default_plan(
    tables: BudgetedTables, collection: EmbeddingBagCollection, world_size: int, local_size: int
) -> dict[str, ParameterSharding]:
    """Every table whole on one rank, bytes and lookups spread evenly; the same on every rank.

    Table-wise, each table's optimizer steps inside its backward and moves the rows of the batch only, as on
    one process. The heaviest first, each goes to the rank with the least so far (Graham's LPT); tables that
    share a ROBE array go together. A table's weight is its share of all bytes, cached rows among them, plus
    its share of all lookups.

    Args:
        tables: the model's.
        collection: made of them.
        world_size: number of ranks.
        local_size: ranks on one machine.

    Returns:
        by table name.
    """
    every = tables.tables
    total = max(1, tables.memory.total.num_bytes)
    num_bytes = {record.table: record.num_bytes for record in tables.memory}
    groups = []
    for _, peers in storages(every):
        stored = sum(num_bytes[peer.name] for peer in peers)
        groups.append((stored / total + len(peers) / len(every), [peer.name for peer in peers]))
    load = [0.0] * world_size
    ways: dict[str, ParameterShardingGenerator] = {}
    # Python's sort is stable, so equal weights keep the order of the tables.
    for weight, names in sorted(groups, key=lambda group: -group[0]):
        rank = load.index(min(load))
        load[rank] += weight
        ways |= {name: table_wise(rank, compute_kernel="fused") for name in names}
    plan: dict[str, ParameterSharding] = construct_module_sharding_plan(
        collection,
        {table.name: ways[table.name] for table in every},
        sharder=EmbeddingBagCollectionSharder(),
        local_size=local_size,
        world_size=world_size,
        device_type=collection.device.type,
    )
    return plan


@dataclass(frozen=True)
class ShardedModel:
    """A model over the ranks, its optimizer, and where each table is.

    Attributes:
        column_shards: the widths of tables that are cut by columns.
    """

    model: DistributedModelParallel
    optimizer: CombinedOptimizer
    sharding: dict[str, str]
    column_shards: dict[str, list[int]]


def build_sharded(config: RunConfig, log: ClickLog, tables: BudgetedTables, world: World) -> ShardedModel:
    """The click model over all ranks; it starts from the weights that one process would start from.

    Each rank makes the whole model first, with its tables' optimizers, for those weights, and keeps its part:
    more memory than the plan counts, until the model is sharded.

    Raises:
        ConfigError: a plan that does not fit the model or that ranks disagree on, before anything is sharded.
    """
    with world.agreeing():
        model = build_model(config, log, tables)
        path, collection = find_collection(model)
        kind, _, settings = optimizer_settings(config)
        _apply_optimizer_in_backward(kind, collection.parameters(), dict(settings))
        if config.plan is not None:
            plan = load_plan(config.plan, model).plan[path]
            _check_device(config, plan)
        else:
            plan = default_plan(tables, collection, world.size, world.local_size)
    sharding = {name: _described(plan[name]) for name in plan}
    world.check_equal("sharding plans", {name: _facts(own) for name, own in plan.items()})
    with world.agreeing():
        sharded = shard_model(model, plan, torch.device(config.device), config.communication_slices)
    return ShardedModel(sharded, build_sharded_optimizer(config, sharded), sharding, column_shards(plan))


def shard_model(
    model: nn.Module,
    plan: Mapping[str, ParameterSharding],
    device: torch.device,
    communication_slices: int = 1,
) -> DistributedModelParallel:
    """Spread ``model`` over the default group's ranks; its weights stay those it has now.

    Args:
        model: the whole model, equal on every rank, with its tables' optimizers attached. It is used up: its
            tables are empty afterwards, and its layers are the sharded model's.
        plan: by table name.
        device: of this rank.
        communication_slices: of the sharder.
    """
    path, collection = find_collection(model)
    state = model.state_dict()
    own = EmbeddingModuleShardingPlan(plan)
    sharded = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.GroupMember.WORLD),
        device=device,
        plan=ShardingPlan({path: own}),
        sharders=get_sharders(communication_slices),
    )
    # torchrec draws the tables anew.
    sharded.load_state_dict(state)
    _empty(collection)
    return sharded


def _empty(collection: nn.Module) -> None:
    """Give the memory of parameters and of their attached optimizers back.

    torch holds a parameter that had an optimizer attached for as long as the process runs
    (``param_to_acc_grad_map``), and through it the optimizer; dropping the collection frees neither.
    """
    for parameter in collection.parameters():
        for optimizer in attached_to(parameter):
            optimizer.state.clear()
        parameter.data = parameter.data.new_empty(0)


def build_sharded_optimizer(config: RunConfig, model: DistributedModelParallel) -> CombinedOptimizer:
    """The optimizers in the tables' backward, that of replicated tables, and that of the dense layers.

    A replicated uncompressed table takes the tables' kind of optimizer, but its gradient is of the table's
    size, as torchrec has it: Adam then moves every row, not those of the batch only.
    """
    tables, layers, settings = optimizer_settings(config)
    path, _ = table_step(model)
    others = dict(in_backward_optimizer_filter(model.named_parameters()))
    replicated = {name: value for name, value in others.items() if name.startswith(f"{path}.")}
    dense = {name: value for name, value in others.items() if name not in replicated}
    fused: dict[str, Any] = {"fused": config.device == "cpu" or layers is not torch.optim.Adagrad}
    parts = [
        ("", model.fused_optimizer),
        ("", KeyedOptimizerWrapper(dense, lambda parameters: layers(parameters, **settings, **fused))),
    ]
    if replicated:
        parts.append(("", KeyedOptimizerWrapper(replicated, lambda own: tables(own, **settings))))
    return CombinedOptimizer(parts)


def whole_weights(model: DistributedModelParallel, world: World) -> dict[str, Tensor]:
    """The unsharded model's state dict, in host memory on rank 0; empty on the others, which take part."""
    whole: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, ShardedTensor):
            if world.is_first:
                whole[name] = value.detach().cpu().contiguous()
            continue
        properties = value.metadata().tensor_properties
        device = value.local_shards()[0].tensor.device if value.local_shards() else torch.device("cpu")
        target = None
        if world.is_first:
            target = torch.empty(value.size(), dtype=properties.dtype, device=device)
        # Through float32, torch's default, ids would lose bits.
        value.gather(dst=0, out=target, dtype=properties.dtype)
        if target is not None:
            whole[name] = target.cpu()
    return whole


def _check_device(config: RunConfig, plan: Mapping[str, ParameterSharding]) -> None:
    for name, sharding in plan.items():
        for shard in sharding.sharding_spec.shards if sharding.sharding_spec is not None else ():
            device = shard.placement.device()
            if device.type != config.device:
                raise ConfigError(
                    f"--plan {config.plan} puts table {name!r} on {device.type} and --device is "
                    f"{config.device}; make it with recemb plan --device {config.device}"
                )


def _facts(sharding: ParameterSharding) -> str:
    """All that ranks must have in common: torchrec orders columns by kernel, too."""
    spec = sharding.sharding_spec
    shards = [] if spec is None else spec.shards
    cuts = [f"{s.shard_offsets} + {s.shard_sizes} on {s.placement}" for s in shards]
    return f"{_described(sharding)}, {sharding.compute_kernel}, {'; '.join(cuts)}"


def _described(sharding: ParameterSharding) -> str:
    ranks = sharding.ranks or []
    return f"{sharding.sharding_type} on {','.join(map(str, ranks))}" if ranks else sharding.sharding_type
