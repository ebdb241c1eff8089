"""Gradients of the distinct rows of a family, from those of the pooled bags."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recemb_kernels.triton_frame.elements import cdiv
from recemb_kernels.triton_frame.family import Call, Family
from recemb_kernels.triton_frame.kernels import find_gradients, segment_sum, sum_pieces
from recemb_kernels.triton_frame.launches import find_constants, piece_constants, segment_constants


def row_gradients(family: Family[Any], call: Call, grad_out: Tensor, dim: int) -> Tensor:
    """[L, D] float32: the gradient of each distinct row that belongs to the family; others are not written.

    Positions of one row are summed by pieces of at most ``PIECE``, then piece by piece: one owner for each
    sum, in the order of positions, so that the bits do not depend on scheduling.
    """
    plan, batch = call.plan, call.batch
    count = batch.ids.numel()
    cuts = plan.cuts[family.index :]
    pieces = torch.empty(count, dim, dtype=torch.float32, device=family.device)
    rows = torch.empty_like(pieces)
    start = torch.empty(count, dtype=torch.int64, device=family.device)
    scale = torch.empty(count, dtype=torch.float32, device=family.device)
    weights = batch.weights
    constants = find_constants(weights is not None)
    find_gradients[(cdiv(count, constants["BL"]),)](
        start,
        scale,
        plan.order,
        call.bag,
        batch.offsets if weights is None else weights,
        batch.offsets,
        family.batch_features,
        batch.size,
        grad_out.shape[1],
        count,
        **constants,
    )
    constants = piece_constants(dim)
    grid = (cdiv(count, constants["BP"]), cdiv(dim, constants["BD"]))
    sum_pieces[grid](
        pieces,
        grad_out,
        start,
        scale,
        plan.piece_first,
        plan.row_piece,
        cuts,
        **constants,
    )
    sum_segments(rows, pieces, plan.row_piece, cuts, None, count)
    return rows


def sum_segments(
    out: Tensor, source: Tensor, first: Tensor, cuts: Tensor, source_base: Tensor | None, most: int
) -> None:
    """``out[n]`` = sum of ``source[first[n] : first[n + 1]]`` for n in ``cuts``, at most ``most`` of them.

    With ``source_base``, both are workspaces of one micro-batch: ``out`` starts at row ``cuts[0]`` and
    ``source`` at row ``source_base[0]``.
    """
    width = out.shape[1]
    constants = segment_constants(width, source_base is not None)
    segment_sum[(cdiv(most, constants["BN"]), cdiv(width, constants["BW"]))](
        out,
        source,
        first,
        cuts,
        cuts if source_base is None else source_base,
        **constants,
    )
