"""A model whose tables are spread over the ranks: its plan, its weights at the start, its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingPlan

from recemb.backends import storages
from recemb.errors import ConfigError
from recemb.planner.budget import BudgetedTables
from recemb.torchrec_io import EmbeddingBagCollectionSharder, get_sharders
from recemb.torchrec_io.embedding_bag_collection import EmbeddingBagCollection
from recemb.training.table_step import find_collection


def default_plan(
    tables: BudgetedTables, collection: EmbeddingBagCollection, world_size: int, local_size: int
) -> dict[str, ParameterSharding]:
    """Every table whole on one rank, bytes and lookups spread evenly; the same on every rank.

    Table-wise, each table's optimizer steps inside its backward and moves the rows of the batch only, as on
    one process. The heaviest first, each goes to the rank with the least so far (Graham's LPT); tables that
    share a ROBE array go together. A table's weight is its share of all bytes plus its share of all lookups.

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
    groups = []
    for backend, peers in storages(every):
        stored = backend.num_params(peers) * 4
        groups.append((stored / total + len(peers) / len(every), [peer.name for peer in peers]))
    load = [0.0] * world_size
    ways = {}
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


def shard_model(
    model: nn.Module, plan: Mapping[str, ParameterSharding], device: torch.device
) -> DistributedModelParallel:
    """Spread ``model`` over the default group's ranks; its weights stay those it has now.

    Args:
        model: the whole model, equal on every rank, with its tables' optimizers attached. It may be dropped
            afterwards.
        plan: by table name.
        device: of this rank.
    """
    path, _ = find_collection(model)
    state = model.state_dict()
    sharded = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.GroupMember.WORLD),
        device=device,
        plan=ShardingPlan({path: dict(plan)}),
        sharders=get_sharders(),
    )
    # torchrec draws the tables anew.
    sharded.load_state_dict(state)
    return sharded
