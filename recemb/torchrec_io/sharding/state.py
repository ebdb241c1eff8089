"""State dicts of sharded compressed tables: one-shard ``ShardedTensor`` under the unsharded module's keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed._shard.sharding_spec.api import EnumerableShardingSpec

from recemb.errors import ConfigError


def one_shard(
    local: Tensor | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    placement: Any,
    group: dist.ProcessGroup | None,
) -> ShardedTensor:
    """A tensor that lies whole on one rank, as every rank describes it.

    Args:
        local: the tensor on that rank, which is written to when a checkpoint is loaded; ``None`` elsewhere.
        shape: its shape.
        dtype: its type.
        placement: torch's name of that rank and device.
        group: the ranks.
    """
    shard = ShardMetadata(shard_offsets=[0, 0], shard_sizes=list(shape), placement=placement)
    metadata = EnumerableShardingSpec([shard]).build_metadata(
        torch.Size(shape), TensorProperties(dtype=dtype)
    )
    shards = [] if local is None else [Shard(local, metadata.shards_metadata[0])]
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata, process_group=group)


def save_shards(destination: dict[str, Any], prefix: str, shards: Mapping[str, ShardedTensor]) -> None:
    """Put the sharded tensors in the place of the local ones.

    Args:
        destination: the state dict.
        prefix: of the collection's keys in it.
        shards: ``<table>.<param>`` -> its tensor.
    """
    for key, tensor in shards.items():
        destination[f"{prefix}embedding_bags.{key}"] = tensor


def load_shards(state: dict[str, Any], prefix: str, shards: Mapping[str, ShardedTensor]) -> None:
    """Replace what is to be loaded, sharded or whole, by what this rank holds of it.

    Raises:
        ConfigError: another rank holds it, or its shape differs; nothing has been loaded into these tables.
    """
    local = {}
    for key, own in shards.items():
        name = f"{prefix}embedding_bags.{key}"
        if name not in state:
            continue
        given = state[name]
        if tuple(given.size()) != tuple(own.size()):
            raise ConfigError(
                f"{name}: the state to load has shape {tuple(given.size())}, not {tuple(own.size())}; it is "
                "of another table or compression"
            )
        if not own.local_shards():
            local[name] = torch.empty(0)
        elif not isinstance(given, ShardedTensor):
            local[name] = given
        elif given.local_shards():
            local[name] = given.local_shards()[0].tensor
        else:
            raise ConfigError(
                f"{name}: the state to load lies on another rank than the plan puts it; load it through "
                "torch.distributed.checkpoint, or as a plain tensor"
            )
    state.update(local)
