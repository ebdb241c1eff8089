"""Sharded compressed tables in state dicts: torch's ``ShardedTensor`` under the unsharded module's keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from recemb.torchrec_io.loading import check_tensors


@dataclass(frozen=True)
class RowShards:
    """The ranges of rows that a tensor, and its optimizer state, is cut into; one range is the whole.

    Attributes:
        sizes: rows of each range, in order.
        placements: torch's names of the rank and device where each lies.
        own: the position of this rank's range, or ``None``.
        group: the ranks.
    """

    sizes: Sequence[int]
    placements: Sequence[Any]
    own: int | None
    group: dist.ProcessGroup | None

    def tensor(self, local: Tensor | None, row: Sequence[int], dtype: torch.dtype) -> ShardedTensor:
        """[sum of sizes, *row] as every rank describes it.

        Args:
            local: this rank's rows, which are written to when a checkpoint is loaded; ``None`` without any.
            row: the shape of one.
        """
        starts = [sum(self.sizes[:k]) for k in range(len(self.sizes))]
        shards = [
            ShardMetadata([start, *(0 for _ in row)], [size, *row], placement)
            for start, size, placement in zip(starts, self.sizes, self.placements, strict=True)
        ]
        metadata = EnumerableShardingSpec(shards).build_metadata(
            torch.Size((sum(self.sizes), *row)), TensorProperties(dtype=dtype)
        )
        held = [] if self.own is None or local is None else [Shard(local, metadata.shards_metadata[self.own])]
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            held, metadata, process_group=self.group
        )

    def state(self, local: Tensor) -> ShardedTensor:
        """Optimizer state of this rank's rows, [rows, *], as every rank describes it."""
        return self.tensor(local, local.shape[1:], local.dtype)


def save_shards(destination: dict[str, Any], prefix: str, shards: Mapping[str, ShardedTensor]) -> None:
    """Put the sharded tensors in the place of the local ones.

    Args:
        destination: the state dict.
        prefix: of the collection's keys in it.
        shards: ``<table>.<param>`` -> its tensor.
    """
    for key, tensor in shards.items():
        destination[f"{prefix}embedding_bags.{key}"] = tensor


def held_of(value: Any) -> Any:
    """What this rank holds of a tensor of a table on one rank, [0] of another's; others as they are."""
    if not isinstance(value, ShardedTensor):
        return value
    return value.local_shards()[0].tensor if value.local_shards() else torch.empty(0)


def load_shards(state: dict[str, Any], prefix: str, shards: Mapping[str, ShardedTensor]) -> None:
    """Replace what is to be loaded, sharded or whole, by what this rank holds of it.

    Raises:
        ConfigError: another rank holds it, or its shape differs; nothing has been loaded into these tables.
    """
    check_tensors(shards, state, prefix)
    local = {}
    for key, own in shards.items():
        name = f"{prefix}embedding_bags.{key}"
        if name not in state:
            continue
        given = state[name]
        if not own.local_shards():
            local[name] = torch.empty(0)
            continue
        (held,) = own.local_shards()
        start, rows = held.metadata.shard_offsets[0], held.metadata.shard_sizes[0]
        if not isinstance(given, ShardedTensor):
            local[name] = given.narrow(0, start, rows)
            continue
        for shard in given.local_shards():
            if shard.metadata.shard_offsets[0] == start and shard.metadata.shard_sizes[0] == rows:
                local[name] = shard.tensor
        if name not in local:
            raise ConfigError(
                f"{name}: the state to load is cut or placed in another way than the plan's; load it through "
                "torch.distributed.checkpoint, or as a plain tensor"
            )
    state.update(local)
