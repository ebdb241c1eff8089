"""Pooling rows into bags on the device, and the gradient of per-sample weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recemb_kernels.triton_frame.elements import cdiv
from recemb_kernels.triton_frame.family import Backward, Call, Family
from recemb_kernels.triton_frame.kernels import pool_rows, weight_gradients
from recemb_kernels.triton_frame.launches import pool_constants, weigh_constants


def pool(
    family: Family[Any],
    call: Call,
    out: Tensor,
    source: Tensor,
    index: Tensor,
    limits: Tensor,
    width: int,
) -> None:
    """Fill the family's columns of ``out`` from rows.

    Args:
        source: [rows, width] in any float dtype; or [F] int64, the address of each feature's
            such array in the family's dtype.
        index: [L] row of each position.
        limits: [2], or [F, 2] with addresses: indices outside are skipped.
        width: columns of a row.
    """
    batch, features = call.batch, family.own_features
    dtype = None if source.is_floating_point() else family.dtype
    constants = pool_constants(width, batch.weights is not None, dtype)
    grid = (cdiv(batch.size, constants["BB"]), len(features), cdiv(width, constants["BD"]))
    pool_rows[grid](
        out,
        source,
        index,
        batch.offsets if batch.weights is None else batch.weights,
        batch.offsets,
        family.features,
        limits,
        batch.size,
        out.shape[1],
        batch.ids.numel(),
        **constants,
    )


def weigh(
    family: Family[Any],
    call: Call,
    asked: Backward,
    source: Tensor,
    index: Tensor,
    limits: Tensor,
    width: int,
) -> None:
    """Fill the gradients of the weights of the family's positions; arguments as of :func:`pool`."""
    batch, count = call.batch, call.batch.ids.numel()
    constants = weigh_constants(width, None if source.is_floating_point() else family.dtype)
    weight_gradients[(cdiv(count, constants["BL"]),)](
        asked.grad_weights,
        source,
        index,
        call.bag,
        batch.offsets,
        asked.grad_out,
        family.batch_features,
        limits,
        batch.size,
        asked.grad_out.shape[1],
        count,
        **constants,
    )
