"""Tables cut by rows over ranks whose batches differ in size, on gloo."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad
from torchrec.distributed.dist_data import (
    PooledEmbeddingsReduceScatter,
    VariableBatchPooledEmbeddingsReduceScatter,
)
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext
from torchrec.distributed.sharding.grid_sharding import GridPooledEmbeddingSharding
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingSharding
from torchrec.distributed.sharding.twrw_sharding import TwRwPooledEmbeddingSharding
from torchrec.distributed.types import ShardingType


class EvenReduceScatter(nn.Module):
    """torchrec's sums of the ranks' rows, [samples of all ranks, sum of D] to [own samples, sum of D].

    The gradients of ranks with unequal batches are gathered as tensors of unequal sizes, which gloo refuses.
    There every rank's part travels with rows of zeros up to the largest part, which the rank that it is for
    cuts off: their gradient is zero, and nothing is looked up for them.

    It stands for both of torchrec's modules, and is called as either: of one batch size per rank, and of one
    per rank and feature, whose rows come in one flat tensor.

    Args:
        group: the ranks.
        codecs: torchrec's, of what is sent.
    """

    def __init__(self, group: dist.ProcessGroup, codecs: Any) -> None:
        super().__init__()
        self._group = group
        self._whole = PooledEmbeddingsReduceScatter(group, codecs)
        self._per_feature = VariableBatchPooledEmbeddingsReduceScatter(group, codecs)

    def forward(self, local_embs: Tensor, input_splits: list[int] | None = None, **per_feature: Any) -> Any:
        flat = bool(per_feature)
        sizes = _sizes(**per_feature) if flat else input_splits or []
        if len(set(sizes)) > 1 and _is_gloo(self._group, local_embs.device):
            summed = self._whole(_padded(local_embs.reshape(-1, 1) if flat else local_embs, sizes))
            summed.callbacks.append(partial(_own, size=sizes[dist.get_rank(self._group)], flat=flat))
            return summed
        return self._per_feature(local_embs, **per_feature) if flat else self._whole(local_embs, input_splits)


class EvenRwSharding(RwPooledEmbeddingSharding):  # type: ignore[misc] # torchrec ships no types
    """torchrec's row-wise sharding, whose backward gloo can take whatever the ranks' batch sizes."""

    def create_output_dist(self, device: torch.device | None = None) -> Any:
        made = super().create_output_dist(device)
        # torchrec makes its own at the first batch, where there is none yet.
        made._dist = EvenReduceScatter(made._pg, made._codecs)
        return made


class _OnHosts:
    """What shardings over the ranks of a host have in common: sums there, then rows go between hosts."""

    def create_output_dist(self, device: torch.device | None = None) -> Any:
        made: Any = super().create_output_dist(device)  # type: ignore[misc] # of the sharding it is mixed into
        # torchrec makes them at the first batch, where there are none yet; those for a batch size per feature
        # when it has one.
        made._create_output_dist_modules(EmbeddingShardingContext(variable_batch_per_feature=True))
        made._intra_dist = EvenReduceScatter(made._intra_pg, made._intra_codecs)
        made._variable_intra_dist = made._intra_dist
        return made


class EvenTwRwSharding(_OnHosts, TwRwPooledEmbeddingSharding):  # type: ignore[misc] # torchrec ships no types
    """torchrec's table-row-wise sharding, as :class:`EvenRwSharding` is its row-wise one."""


class EvenGridSharding(_OnHosts, GridPooledEmbeddingSharding):  # type: ignore[misc] # torchrec ships no types
    """torchrec's grid sharding, likewise."""


EVEN = {
    ShardingType.ROW_WISE.value: EvenRwSharding,
    ShardingType.TABLE_ROW_WISE.value: EvenTwRwSharding,
    ShardingType.GRID_SHARD.value: EvenGridSharding,
}


def _sizes(
    batch_size_per_rank_per_feature: Sequence[Sequence[int]], embedding_dims: Sequence[int]
) -> list[int]:
    """Of each rank's part, in numbers: each feature has a batch size of its own."""
    return [
        sum(size * dim for size, dim in zip(sizes, embedding_dims, strict=True))
        for sizes in batch_size_per_rank_per_feature
    ]


def _is_gloo(group: dist.ProcessGroup, device: torch.device) -> bool:
    # A group may have a backend for each kind of device.
    return group._get_backend(device).name() == "gloo"


def _padded(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """[sum of sizes, D] -> [ranks x largest size, D]."""
    largest = max(sizes)
    return torch.cat([pad(part, (0, 0, 0, largest - len(part))) for part in torch.split(rows, list(sizes))])


def _own(summed: Tensor, size: int, flat: bool) -> Tensor:
    own = summed[:size]
    return own.reshape(-1) if flat else own
