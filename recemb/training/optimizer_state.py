"""The optimizer state of uncompressed tables, which fbgemm keeps on several ranks, as torch keeps it on one.

On one process ``torch.optim.Adagrad`` and torchrec's ``RowWiseAdagrad`` have, for a weight [N, D]::

    step   []                  steps taken, which learning-rate decay alone reads
    sum    [N, D] or [N, 1]    of squared gradients, element by element or of row means

On several, fbgemm's kernel has ``<table>.momentum1`` instead, [N, D] or [N], in shards; it counts no steps.
Checkpoints hold the first form, so that a run goes on with any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.shard import Shard
from torchrec.distributed.types import ParameterSharding

_FBGEMM_SUM = ".momentum1"


def as_on_one_process(state: Mapping[str, Mapping[str, Any]], steps: int) -> dict[str, Mapping[str, Any]]:
    """Adagrad's or row-wise Adagrad's state by parameter, to be saved or loaded into.

    Args:
        state: an optimizer's ``state_dict()["state"]``.
        steps: that each table has taken; what is loaded in its place goes nowhere.

    Returns:
        the same, with fbgemm's sums under torch's name and in its shape. They share fbgemm's memory.
    """
    return {key: _sums(own, steps) if _of_fbgemm(own) else own for key, own in state.items()}


def column_shards(plan: Mapping[str, ParameterSharding]) -> dict[str, list[int]]:
    """Widths of the column shards of each table that a plan cuts by columns.

    fbgemm's row-wise Adagrad takes the mean over the columns of a shard, and so has a sum for each: those of
    a table cut in one way are none of a table that is cut in another, or whole.
    """
    widths = {}
    for name, sharding in plan.items():
        shards = sharding.sharding_spec.shards if sharding.sharding_spec is not None else ()
        columns = {shard.shard_offsets[1]: shard.shard_sizes[1] for shard in shards}
        if len(columns) > 1:
            widths[name] = [columns[start] for start in sorted(columns)]
    return widths


def _of_fbgemm(state: Mapping[str, Any]) -> bool:
    return len(state) == 1 and all(name.endswith(_FBGEMM_SUM) for name in state)


def _sums(state: Mapping[str, Any], steps: int) -> dict[str, Any]:
    (sums,) = state.values()
    return {"step": torch.tensor(float(steps)), "sum": _two_dimensional(sums)}


def _two_dimensional(sums: ShardedTensor) -> ShardedTensor:
    """[N] as [N, 1], over the same memory; of the default group, over which a run shards its tables."""
    known = sums.metadata()
    if len(known.size) == 2:
        return sums
    shards = [
        ShardMetadata([*shard.shard_offsets, 0], [*shard.shard_sizes, 1], shard.placement)
        for shard in known.shards_metadata
    ]
    held = [
        Shard(shard.tensor.unsqueeze(1), shards[known.shards_metadata.index(shard.metadata)])
        for shard in sums.local_shards()
    ]
    metadata = ShardedTensorMetadata(shards, torch.Size((*known.size, 1)), known.tensor_properties)
    return ShardedTensor._init_from_local_shards_and_global_metadata(held, metadata)
