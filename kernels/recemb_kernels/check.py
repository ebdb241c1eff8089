"""One pass over a batch on CPU that says whether it is well formed; its caller finds out what is wrong."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from recemb_kernels.digit_tree.group import driver
from recemb_kernels.native import attempt

Limits = ctypes.Array[ctypes.c_int64]


def bags_are_valid(
    ids: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    num_features: int,
    batch_size: int,
    limits: Limits | None,
) -> bool:
    """Whether offsets rise from 0 to L, ids lie in [0, limits[f]) and weights are finite.

    Args:
        ids: [L] int64.
        offsets: [F * B + 1] int64.
        weights: [L] float32, or ``None``.
        num_features: F.
        batch_size: B.
        limits: F numbers, or ``None`` to leave the ids alone.

    Returns:
        ``False`` also where the pass cannot be made: other devices and dtypes, no compiler, torch.compile.
    """
    if torch.compiler.is_compiling() or not (ids.is_cpu and ids.is_contiguous() and offsets.is_contiguous()):
        return False
    if not offsets.is_cpu or (weights is not None and not weights.is_cpu):
        return False
    if weights is not None and not (weights.dtype is torch.float32 and weights.is_contiguous()):
        return False
    library = attempt("check_bags", driver)
    return library is not None and not library.recemb_tree_check(
        ids.data_ptr(),
        offsets.data_ptr(),
        None if weights is None else weights.data_ptr(),
        ids.numel(),
        num_features,
        batch_size,
        None if limits is None else ctypes.addressof(limits),
        torch.get_num_threads(),
    )
