"""Several ranks in one process: torch's thread-per-rank process group, and tensors sharded over them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed._shard.sharding_spec.api import EnumerableShardingSpec
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

# A rank, and the offsets and sizes of what it holds.
Layout = Sequence[tuple[int, tuple[int, ...], tuple[int, ...]]]
_Result = TypeVar("_Result")


def on_ranks(world: int, work: Callable[[int], _Result]) -> list[_Result]:
    """What ``work(rank)`` returns on each of ``world`` ranks, which are threads.

    Raises:
        BaseException: what it raised on the lowest rank that failed.
    """
    results: dict[int, _Result] = {}
    failures: dict[int, BaseException] = {}
    store = dist.HashStore()

    def run(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
            results[rank] = work(rank)
        except BaseException as error:
            failures[rank] = error
        finally:
            dist.destroy_process_group()

    _install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    try:
        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
            assert not thread.is_alive(), "a rank waits for the others"
    finally:
        ProcessLocalGroup.reset()
        _uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    if failures:
        raise failures[min(failures)]
    return [results[rank] for rank in range(world)]


def sharded(full: Tensor, layout: Layout, rank: int, group: dist.ProcessGroup | None = None) -> ShardedTensor:
    """``full``, of which this rank holds its own copies of its parts."""
    parts = [
        ShardMetadata(list(offsets), list(sizes), placement=f"rank:{owner}/cpu")
        for owner, offsets, sizes in layout
    ]
    metadata = EnumerableShardingSpec(parts).build_metadata(full.shape, TensorProperties(dtype=full.dtype))
    shards = []
    for (owner, *_), part in zip(layout, parts, strict=True):
        if owner == rank:
            box = zip(part.shard_offsets, part.shard_sizes, strict=True)
            shards.append(Shard(full[tuple(slice(at, at + size) for at, size in box)].clone(), part))
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata, process_group=group)


def local(tensor: ShardedTensor) -> list[tuple[tuple[slice, ...], Tensor]]:
    """Where each of this rank's shards lies in the whole, and the shard."""
    return [
        (
            tuple(
                slice(at, at + size)
                for at, size in zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True)
            ),
            shard.tensor,
        )
        for shard in tensor.local_shards()
    ]


def bits(tensor: Tensor) -> bytes:
    """Its elements, byte for byte: NaNs are equal to themselves."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(state: Any, other: Any) -> bool:
    """Whether two states are equal, tensors bit for bit and in type, shape and container."""
    if isinstance(state, Tensor):
        alike = isinstance(other, Tensor) and state.dtype is other.dtype and state.shape == other.shape
        return alike and bits(state) == bits(other)
    if isinstance(state, dict):
        return (
            isinstance(other, dict)
            and state.keys() == other.keys()
            and all(same(value, other[key]) for key, value in state.items())
        )
    if isinstance(state, list | tuple):
        return (
            type(state) is type(other)
            and len(state) == len(other)
            and all(same(a, b) for a, b in zip(state, other, strict=True))
        )
    return type(state) is type(other) and bool(state == other)
