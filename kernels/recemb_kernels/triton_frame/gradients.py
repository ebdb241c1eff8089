"""Gradients of the distinct rows of a family, from those of the pooled bags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recemb_kernels.triton_frame.elements import cdiv
from recemb_kernels.triton_frame.family import Call, Family
from recemb_kernels.triton_frame.gradient_kernels import find_gradients, join_places, sum_places
from recemb_kernels.triton_frame.kernels import segment_sum
from recemb_kernels.triton_frame.launches import (
    PIECE,
    find_constants,
    join_constants,
    place_constants,
    segment_constants,
)


@dataclass(frozen=True, eq=False)
class Places:
    """What each place of a sorted batch gets of the pooled bags' gradient.

    Positions of one row are summed by pieces of at most ``PIECE``, then piece by piece
    (:mod:`~recemb_kernels.triton_frame.gradient_kernels`): one owner for each sum, in the order of positions,
    so that the bits do not depend on scheduling, nor on which rows are asked for together.

    Attributes:
        call: the look-up.
        grad_out: [B, columns] float32.
        start: [L] where in it the gradient of the place's bag starts.
        scale: [L] float32, what multiplies that; ``None`` where bags are sums without weights.
    """

    call: Call
    grad_out: Tensor
    start: Tensor
    scale: Tensor | None

    @classmethod
    def of(cls, family: Family[Any], call: Call, grad_out: Tensor) -> Places:
        """The places of the family's features; the others mean nothing."""
        batch, count = call.batch, call.batch.ids.numel()
        kind = torch.int32 if grad_out.numel() < 2**31 else torch.int64
        start, scale = torch.empty(count, dtype=kind, device=family.device), None
        weights = batch.weights
        if weights is not None or any(f.mean for f in family.own_features):
            scale = torch.empty(count, dtype=torch.float32, device=family.device)
        constants = find_constants(scale is not None, weights is not None)
        find_gradients[(cdiv(count, constants["BL"]),)](
            start,
            start if scale is None else scale,
            call.plan.order,
            call.bag,
            batch.offsets if weights is None else weights,
            batch.offsets,
            family.batch_features,
            batch.size,
            grad_out.shape[1],
            count,
            **constants,
        )
        return cls(call, grad_out, start, scale)

    def rows(self, cuts: Tensor, dim: int, most: int | None = None) -> Tensor:
        """[L, D] float32: the gradients of rows from ``cuts[0]`` to ``cuts[1]``; others are not written.

        With ``most``, [most, D]: there are no more of them, and the first is that of row ``cuts[0]``.
        """
        plan, count = self.call.plan, len(self.start)
        relative = most is not None
        rows, pieces = count if most is None else most, cdiv(count, PIECE)
        out, parts = (
            torch.empty(numel, dim, dtype=torch.float32, device=self.start.device) for numel in (rows, pieces)
        )
        runs = plan.order, plan.inverse, plan.first, cuts, count
        scale = self.start if self.scale is None else self.scale
        constants = place_constants(dim, self.scale is not None, relative)
        joining = join_constants(dim, relative)
        row_programs = cdiv(rows, constants["BP"])
        programs = row_programs + cdiv(pieces, constants["BP"]), cdiv(dim, constants["BD"])
        sum_places[programs](out, parts, self.grad_out, self.start, scale, *runs, row_programs, **constants)
        join_places[cdiv(pieces, joining["BN"]), cdiv(dim, joining["BD"])](out, parts, *runs, **joining)
        return out


def row_gradients(family: Family[Any], call: Call, grad_out: Tensor, dim: int) -> Tensor:
    """[L, D] float32: the gradients of the distinct rows of the family; others are not written."""
    return Places.of(family, call, grad_out).rows(call.plan.cuts[family.index :], dim)


def sum_segments(
    out: Tensor, source: Tensor, first: Tensor, cuts: Tensor, most: int, base: Tensor | None = None
) -> None:
    """``out[n]`` = sum of ``source[first[n] : first[n + 1]]`` for n in ``cuts``, at most ``most`` of them.

    With a ``base``, both are workspaces: ``out`` starts at row ``base[0]``, ``source`` at the first of row
    ``cuts[0]``.
    """
    width = out.shape[1]
    constants = segment_constants(width, base is not None)
    segment_sum[(cdiv(most, constants["BN"]), cdiv(width, constants["BW"]))](
        out,
        source,
        first,
        cuts,
        cuts if base is None else base,
        **constants,
    )
