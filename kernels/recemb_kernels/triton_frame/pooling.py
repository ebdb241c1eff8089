"""Pooling rows into bags on the device, and the gradient of per-sample weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recemb_kernels.triton_frame import turn_rows
from recemb_kernels.triton_frame.elements import cdiv
from recemb_kernels.triton_frame.family import Backward, Call, Family
from recemb_kernels.triton_frame.kernels import pool_rows, weight_gradients
from recemb_kernels.triton_frame.launches import pool_constants, weigh_constants


@dataclass(frozen=True, eq=False)
class Rows:
    """Where bags find their rows.

    Attributes:
        source: [rows, width] in any float dtype; or [F] int64, the address of each feature's
            such array in the family's dtype.
        index: [L] row of each position.
        limits: [2], or [F, 2] with addresses: indices outside are skipped; or [turns + 1], of each turn.
        width: columns of a row.
    """

    source: Tensor
    index: Tensor
    limits: Tensor
    width: int


@dataclass(frozen=True, eq=False)
class Turns:
    """Some of the turns in which bags take rows that are computed, so that not all need memory at once.

    A bag adds its rows up turn by turn, those of a turn by position. Turns depend on the batch alone, so a
    bag's rows come in one order however many are computed at once.

    Attributes:
        first: number of the first of them.
        past: one more than the last's.
        turns: how many there are in all.
        base: [1] the row that the source begins with.
        spans: [F, 2] of each feature's table the first row, and the one after its last.
    """

    first: int
    past: int
    turns: int
    base: Tensor
    spans: Tensor


def turn_cuts(family: Family[Any], call: Call) -> Tensor:
    """[turns + 1] the first row of each turn of a family, then the one after its last."""
    count, cuts = call.batch.ids.numel(), call.plan.cuts[family.index :]
    if count <= turn_rows(count):
        return cuts[:2]
    steps = family.remembered(tuple(range(0, count + turn_rows(count), turn_rows(count))))
    return torch.minimum(cuts[:1] + steps, cuts[1:2])


def table_spans(family: Family[Any], call: Call, keys: Tensor) -> Tensor:
    """[F, 2] the first row of each feature's table, and the one after its last.

    Args:
        keys: [F, 2] int64, theirs; counted from the family's first key.
    """
    own = (keys + call.keys.bounds[family.index]).to(call.plan.row_key.dtype)
    return torch.searchsorted(call.plan.row_key, own)


def pool(family: Family[Any], call: Call, out: Tensor, rows: Rows, turns: Turns | None = None) -> None:
    """Fill the family's columns of ``out``; with ``turns``, add to what those before them have left there."""
    batch, features = call.batch, family.own_features
    dtype = None if rows.source.is_floating_point() else family.dtype
    constants = pool_constants(rows.width, batch.weights is not None, dtype, turns is not None)
    pool_rows[cdiv(batch.size, constants["BB"]), len(features), cdiv(rows.width, constants["BD"])](
        out,
        rows.source,
        rows.index,
        batch.offsets if batch.weights is None else batch.weights,
        batch.offsets,
        family.features,
        rows.limits,
        rows.limits if turns is None else turns.base,
        rows.limits if turns is None else turns.spans,
        batch.size,
        out.shape[1],
        batch.ids.numel(),
        0 if turns is None else turns.first,
        1 if turns is None else turns.past,
        1 if turns is None else turns.turns,
        **constants,
    )


def weigh(family: Family[Any], call: Call, asked: Backward, rows: Rows) -> None:
    """Fill the gradients of the weights of the family's positions."""
    batch, count = call.batch, call.batch.ids.numel()
    constants = weigh_constants(rows.width, None if rows.source.is_floating_point() else family.dtype)
    weight_gradients[(cdiv(count, constants["BL"]),)](
        asked.grad_weights,
        rows.source,
        rows.index,
        call.bag,
        batch.offsets,
        asked.grad_out,
        family.batch_features,
        rows.limits,
        batch.size,
        asked.grad_out.shape[1],
        count,
        **constants,
    )
