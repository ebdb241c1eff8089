"""Pooling rows into bags on the device, and the gradient of per-sample weights."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor

from recemb_kernels.triton_frame.elements import ELEMENTS, cdiv, tile
from recemb_kernels.triton_frame.family import Backward, Call, Family
from recemb_kernels.triton_frame.kernels import pool_rows, weight_gradients


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
    block = tile(width, 128)
    bags = max(1, 1024 // block)
    indirect = not source.is_floating_point()
    pool_rows[(cdiv(batch.size, bags), len(features), cdiv(width, block))](
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
        LIMITS=2 if indirect else 0,
        INDIRECT=indirect,
        D=width,
        WEIGHTED=batch.weights is not None,
        ELEMENT=ELEMENTS[family.dtype] if indirect else tl.float32,
        BB=bags,
        BD=block,
        num_warps=4,
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
    block = tile(width, 64)
    positions = max(1, 1024 // block)
    indirect = not source.is_floating_point()
    weight_gradients[(cdiv(count, positions),)](
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
        LIMITS=2 if indirect else 0,
        INDIRECT=indirect,
        D=width,
        ELEMENT=ELEMENTS[family.dtype] if indirect else tl.float32,
        BL=positions,
        BD=block,
        num_warps=4,
    )
