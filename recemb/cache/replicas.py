"""Replicas of cached tables under DistributedDataParallel, which all exchange rows or none."""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def ddp_around() -> DistributedDataParallel | None:
    """The DistributedDataParallel that a look-up runs under, which torch says only there."""
    # torch leaves this one untyped.
    around = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    return cast(DistributedDataParallel | None, around)


class Replicas:
    """Those of a collection in a look-up: of several ranks, whose buffers are the first one's.

    Buffers are broadcast at the first look-up after a backward that has averaged gradients: then all ranks
    have one cache, and find together that an exchange is due.
    """

    def __init__(self, around: DistributedDataParallel) -> None:
        self._around = around
        # torch leaves this one untyped.
        self.are_synced = bool(around.will_sync_module_buffers())  # type: ignore[no-untyped-call]

    @classmethod
    def of(cls, buffer: Tensor) -> Replicas | None:
        """Of the collection that a buffer belongs to; ``None`` where each rank's is its own."""
        around = ddp_around()
        # It leaves out what a sharded collection has, say.
        if around is None or not any(buffer is other for other in around.modules_buffers):
            return None
        return cls(around) if dist.get_world_size(around.process_group) > 1 else None

    def all_may(self, waits: bool, device: torch.device) -> bool:
        """Whether none of them has to wait before rows are exchanged; all ask together.

        What one waits for, a graph that it holds or a gradient that is not zero, others need not have. A rank
        whose data have ended (``join()``) could not answer: nothing is exchanged from then on.

        Args:
            waits: whether this one has to.
            device: of the buffers.
        """
        if self._around._join_config.enable or not self.are_synced:
            return False
        waiting = torch.tensor([waits], dtype=torch.int32, device=device)
        dist.all_reduce(waiting, dist.ReduceOp.MAX, group=self._around.process_group)
        return not int(waiting)
