"""A batch over cached tables as two streams, split on the device without the host learning their lengths.

Both streams keep the batch's positions and offsets, with -1 where the other has the position, which the
kernels for GPU skip. Every feature is in the cold stream too, so that its offsets are the batch's own; those
of tables without a cache have nothing there::

    features  [f_0 .. f_{F-1}, f_0 .. f_{F-1}]       pooled [B, 2 W]       out = hot + cold

A mean divides by the length of the whole bag in both streams, so their sum is the bag's mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recemb.bags import Bags
from recemb.cache.hot_rows import HotRowCache
from recemb.cache.merge import Step
from recemb.cache.split import Split
from recemb.cache.streams import NO_KEY, Streams, replace_by_rows
from recemb.spec import TableSpec

if TYPE_CHECKING:
    from recemb.backends.base import Backend


@dataclass(frozen=True, eq=False)
class DeviceSplit(Split):
    """A batch split in two; bounds are left empty, as the host does not know them.

    Attributes:
        bag: [L] bag of each position, feature by feature.
        offsets: [F * B + 1] of the batch.
    """

    bag: Tensor
    offsets: Tensor


class DeviceStreams(Streams):
    """:class:`Streams` for kernels that skip negative ids."""

    compact = False

    def __init__(self, lookups: Sequence[TableSpec]) -> None:
        super().__init__(lookups)
        self._base_of: dict[torch.device, Tensor] = {}

    @property
    def expanded(self) -> list[TableSpec]:
        return [replace_by_rows(table) for table in self.lookups] + list(self.lookups)

    def served(self, tables: Sequence[Backend]) -> list[Backend]:
        return [table if table.cache is None else table.cache for table in tables] + list(tables)

    def _splits(
        self, keys: Tensor, slots: Tensor, bags: Bags, threads: int | None = None
    ) -> Callable[[], DeviceSplit]:
        return partial(self._split, keys, slots, bags)

    def _split(self, keys: Tensor, slots: Tensor, bags: Bags) -> DeviceSplit:
        ids, count = bags.ids, bags.ids.numel()
        bag = _bags_of(bags.offsets, count)
        base, rows = self._constants_on(ids.device)[:, bag // max(1, bags.batch_size)]
        # A bad id, which the host learns of later, is in neither stream: it must not be counted.
        cached = (base >= 0) & (ids >= 0) & (ids < rows)
        wanted = torch.where(cached, ids + base, NO_KEY)
        at = torch.searchsorted(keys, wanted)
        hit = cached & (keys[at] == wanted)
        both = Bags(
            ids=torch.cat(
                [
                    torch.where(base >= 0, torch.where(hit, slots[at], -1), ids),
                    torch.where(cached & ~hit, ids, -1),
                ]
            ),
            offsets=torch.cat([bags.offsets, bags.offsets[1:] + count]),
            num_features=2 * bags.num_features,
            weights=None if bags.weights is None else torch.cat([bags.weights, bags.weights]),
            refused=bags.refused,
        )
        return DeviceSplit(both, [], [], bag, bags.offsets)

    @cached_property
    def columns(self) -> list[tuple[int, slice, slice]]:
        found, begin = [], 0
        for f, table in enumerate(self.lookups):
            end = begin + table.embedding_dim
            if f in self.cached:
                found.append((f, slice(begin, end), slice(self.width + begin, self.width + end)))
            begin = end
        return found

    @property
    def pooled_width(self) -> int:
        return 2 * self.width

    @torch.no_grad()
    def measure(self, k: int, step: Step, grad: Tensor) -> None:
        (f, own, _), split, weights = self.columns[k], step.split, step.split.bags.weights
        assert isinstance(split, DeviceSplit)
        size, count = grad.shape[0], split.bag.numel()
        norms = grad[:, own].float().norm(dim=1).nan_to_num(0, 0, 0)
        if self.lookups[f].pooling == "mean":
            norms = norms / split.offsets[f * size : (f + 1) * size + 1].diff().clamp(min=1)
        each = norms[split.bag % max(1, size)]
        if weights is not None:
            each = each * weights[:count].detach().abs().float()
        slots, misses = self._positions(f, split, size)
        step.caches[self.owner[k]].observe(slots, misses, (each * (slots >= 0), each * (misses >= 0)))

    def _count(self, caches: Sequence[HotRowCache], split: Split, tracked: Sequence[bool]) -> None:
        assert isinstance(split, DeviceSplit)
        for f, cache_, now in zip(self.cached, caches, tracked, strict=True):
            if not now:
                continue
            size = split.bags.batch_size
            slots, misses = self._positions(f, split, size)
            hits = (slots >= 0).sum()
            cache_.count(torch.stack([hits + (misses >= 0).sum(), hits]))
            if cache_.settings.policy != "importance":
                cache_.observe(slots, misses)

    def _positions(self, f: int, split: DeviceSplit, size: int) -> tuple[Tensor, Tensor]:
        """[L] each: slots that feature f has hit and ids that it has missed, -1 at other positions."""
        count = split.bag.numel()
        mine = (split.bag // max(1, size)) == f
        both = split.bags.ids
        return torch.where(mine, both[:count], -1), torch.where(mine, both[count:], -1)

    def _constants_on(self, device: torch.device) -> Tensor:
        """[2, F] what each feature adds to its ids, -1 without a cache, and its rows; copied there once."""
        known = self._base_of.get(device)
        if known is None:
            bases = [-1] * len(self.lookups)
            for f, base in zip(self.cached, self.bases, strict=True):
                bases[f] = base
            rows = [table.num_embeddings for table in self.lookups]
            known = self._base_of[device] = torch.tensor([bases, rows], device=device)
        return known


def _bags_of(offsets: Tensor, num_ids: int) -> Tensor:
    """[L]: the bag that each position lies in."""
    positions = torch.arange(num_ids, device=offsets.device)
    # right=True skips the empty bags that start at the same offset. Offsets that are refused for not running
    # from 0 to L must not lead out of bounds before the host knows.
    bag = torch.searchsorted(offsets, positions, right=True) - 1
    return bag.clamp(0, max(0, offsets.numel() - 2))
