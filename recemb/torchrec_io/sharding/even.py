"""Row-wise sharding over ranks whose batches differ in size, on gloo."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad
from torchrec.distributed.dist_data import PooledEmbeddingsReduceScatter
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingDist, RwPooledEmbeddingSharding


class EvenRwSharding(RwPooledEmbeddingSharding):  # type: ignore[misc] # torchrec ships no types
    """torchrec's row-wise sharding, whose backward gloo can take whatever the ranks' batch sizes."""

    def create_output_dist(self, device: torch.device | None = None) -> RwPooledEmbeddingDist:
        return _EvenDist(self._pg, self.embedding_dims(), self.qcomm_codecs_registry)


class _EvenDist(RwPooledEmbeddingDist):  # type: ignore[misc] # torchrec ships no types
    """torchrec's sums of the ranks' rows, [samples of all ranks, sum of D] to [own samples, sum of D].

    The gradients of ranks with unequal batches are gathered as tensors of unequal sizes, which gloo refuses.
    There every rank's part travels with rows of zeros up to the largest part, which the rank that it is for
    cuts off: their gradient is zero, and nothing is looked up for them.

    Args:
        group: the ranks.
        dims: D of each feature.
        codecs: torchrec's registry.
    """

    def __init__(self, group: dist.ProcessGroup, dims: list[int], codecs: Any) -> None:
        super().__init__(group, dims, codecs)
        self._even = PooledEmbeddingsReduceScatter(group, self._codecs)

    def forward(self, local_embs: Tensor, sharding_ctx: Any = None) -> Any:
        if sharding_ctx is None or not _is_gloo(self._pg, local_embs.device):
            return super().forward(local_embs, sharding_ctx)
        sizes = self._sizes(sharding_ctx)
        if len(set(sizes)) == 1:
            return super().forward(local_embs, sharding_ctx)
        variable = sharding_ctx.variable_batch_per_feature
        rows = local_embs.reshape(-1, 1) if variable else local_embs
        summed = self._even(_padded(rows, sizes))
        summed.callbacks.append(partial(_own, size=sizes[dist.get_rank(self._pg)], flat=variable))
        return summed

    def _sizes(self, sharding_ctx: Any) -> list[int]:
        """Of each rank's part: samples, or numbers when each feature has a batch size of its own."""
        if not sharding_ctx.variable_batch_per_feature:
            return list(sharding_ctx.batch_size_per_rank)
        return [
            sum(size * dim for size, dim in zip(sizes, self._embedding_dims, strict=True))
            for sizes in sharding_ctx.batch_size_per_rank_per_feature
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
