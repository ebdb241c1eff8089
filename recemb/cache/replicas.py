"""Replicas of cached tables under DistributedDataParallel, which exchange the same rows at the same steps.

Each rank counts the ids of its own batches, and the first rank's buffers are broadcast at the first forward
after a backward that has averaged gradients. From there to the next look-up that counts, all ranks have equal
caches, parameters and gradients: an exchange then is the same on all of them, and none has to ask another. At
any other time there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from recemb.cache.hot_rows import HotRowCache, read_again
from recemb.errors import ConfigError

# Forwards that have begun.
_forwards: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def ddp_around() -> DistributedDataParallel | None:
    """The DistributedDataParallel that a look-up runs under, which torch says only there."""
    # torch leaves this one untyped.
    around = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    return cast(DistributedDataParallel | None, around)


class Replicas:
    """What the look-ups of one collection know of those of the other ranks.

    Attributes:
        are_beside: whether the look-up under way is not of a forward that all ranks run, though they train
            together: by it nothing is counted or exchanged.
        may_differ: whether the other ranks' caches may be others than this one's.
    """

    def __init__(self) -> None:
        self.are_beside = self.may_differ = False
        self._around: ref[DistributedDataParallel] | None = None
        self._forward = -1

    def __reduce__(self) -> tuple[type[Replicas], tuple[()]]:
        return Replicas, ()  # a copy is nobody's replica yet

    def look_up(self, caches: Sequence[HotRowCache]) -> bool:
        """See where a look-up runs, outside of any backward; read what the first rank has broadcast.

        Returns:
            Whether it is the first that is known to have replicas.

        Raises:
            ConfigError: rows have been exchanged on one rank that another one has not exchanged.
        """
        known, around = self._around and self._around(), ddp_around()
        if known is None:
            self._around, self.may_differ = None, False
        self.are_beside = known is not None and around is not known
        if around is None:
            return False
        begins = around is not known
        if begins:
            if not _replicates(around, caches):
                return False
            self._around, self.are_beside, self.may_differ = ref(around), False, True
            if around not in _forwards:
                _forwards[around] = 0
                around.register_forward_pre_hook(_begun)
        if self._forward == _forwards[around] and not begins:
            return False
        self._forward = _forwards[around]
        # torch leaves this one untyped.
        if around.will_sync_module_buffers():  # type: ignore[no-untyped-call]
            _refuse_drift(caches, dist.get_rank(around.process_group))
            self.may_differ = False
        return begins

    def have_counted(self) -> None:
        """Ids of this rank have been counted, in a look-up or a backward."""
        self.may_differ = self._around is not None


def _replicates(around: DistributedDataParallel, caches: Sequence[HotRowCache]) -> bool:
    """Whether several ranks have these caches, the first one's: of a sharded collection each has its own."""
    if not around.broadcast_buffers or dist.get_world_size(around.process_group) == 1:
        return False
    return any(buffer is caches[0].ids for buffer in around.modules_buffers)


def _begun(around: nn.Module, _: Any) -> None:
    _forwards[around] = _forwards.get(around, 0) + 1


def _refuse_drift(caches: Sequence[HotRowCache], rank: int) -> None:
    """Refuse to go on where this rank has exchanged other rows than the first, whose buffers it now has."""
    own = [cache.host_value("refreshed") for cache in caches]  # as it is, if a state has been loaded since
    read_again(caches)
    for cache, here in zip(caches, own, strict=True):
        there = cache.host_value("refreshed")
        if here != there:
            raise ConfigError(
                f"table {cache.table.name!r}: the cached rows of rank {rank} have been exchanged at other "
                f"steps than those of the first rank (the last time: {here}, {there}), as ranks have looked "
                "the collection up in different forwards: their tables have drifted apart. Look it up in "
                "each forward of every rank, or shard it (recemb.torchrec_io.get_sharders()), and go on from "
                "a checkpoint"
            )
