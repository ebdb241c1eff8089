"""How a batch of tensor-train rows is cut: into micro-batches, computed at once, and turns of its bags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recemb_kernels.triton_frame import slice_rows, turn_rows
from recemb_kernels.triton_frame.family import Call, Family
from recemb_kernels.triton_frame.pooling import Rows, Turns, pool, table_spans, turn_cuts
from recemb_kernels.tt_gather.triton_levels import Level


@dataclass(frozen=True, eq=False)
class Part:
    """A micro-batch of rows, and the part of the tree above them.

    Attributes:
        levels: of the whole batch.
        parameters: of the family.
        count: L, ids of the whole batch.
        rows: distinct rows of a micro-batch.
        number: of the part, from 0.
        micro_batch: from 0; a part has one, but for a tree of one part, which has all.
    """

    levels: Sequence[Level]
    parameters: Sequence[Tensor]
    count: int
    rows: int
    number: int
    micro_batch: int

    @property
    def last(self) -> int:
        """The level of the rows."""
        return len(self.levels) - 1

    @property
    def whole(self) -> bool:
        """Whether its tree has one part."""
        return self.levels[0].cuts.numel() == 2

    def at(self, k: int) -> int:
        """Its number among the parts of level k."""
        return self.micro_batch if k == self.last else self.number

    def cuts(self, k: int) -> Tensor:
        """Its first node of level k, then the one after its last."""
        return self.levels[k].cuts[self.at(k) :]

    def base(self, k: int) -> Tensor:
        """The node of level k that its workspace begins with: all parts have one of the first level."""
        return self.cuts(k) if k else self.levels[0].cuts


class RowsInTurns:
    """The rows of a look-up, of one turn of its bags after the other (:class:`Turns`).

    Args:
        family: that they are of.
        call: the look-up.
        keys: [F, 2] of each feature's table the first key, and the one after its last.
        kept: whether all rows are, for the gradients of weights.

    Attributes:
        rows: [most, D] float32 memory for them.
    """

    def __init__(self, family: Family[Any], call: Call, keys: Tensor, kept: bool) -> None:
        self._family, self._call = family, call
        self._count, self._cuts = call.batch.ids.numel(), turn_cuts(family, call)
        self._each, self._turns, self._done = turn_rows(self._count), self._cuts.numel() - 1, 0
        self._spans = table_spans(family, call, keys) if self._turns > 1 else None
        self._all = kept or self._turns == 1
        own = max(self._each, slice_rows(self._count, family.micro_batch_rows))
        most = self._count if self._all else min(self._count, own)
        self.rows = torch.empty(most, family.shapes[0].dim, dtype=torch.float32, device=family.device)

    def base(self, part: Part) -> Tensor:
        """The row that :attr:`rows` begins with while it gets those of a micro-batch."""
        if self._all:  # numbered from the first of the batch
            return self._family.remembered((0,))
        return self._cuts[part.micro_batch * part.rows // self._each :]

    def take(self, part: Part, out: Tensor) -> None:
        """Have bags take the turns that end with a micro-batch."""
        end = (part.micro_batch + 1) * part.rows
        if self._all and end < self._count:
            return  # all at once, when the last are there
        past = self._turns if end >= self._count else end // self._each
        if past == self._done:
            return
        turns = None
        if self._spans is not None:
            turns = Turns(self._done, past, self._turns, self.base(part), self._spans)
        rows = Rows(self.rows, self._call.plan.inverse, self._cuts, self.rows.shape[1])
        pool(self._family, self._call, out, rows, turns)
        self._done = past
