"""One pass over a batch on CPU that says whether it is well formed; its caller finds out what is wrong."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from recemb_kernels.digit_tree.group import driver
from recemb_kernels.digit_tree.step import loaded
from recemb_kernels.native import attempt

Limits = ctypes.Array[ctypes.c_int64]
MOST = 2**31 - 1  # ids, or bags and one: positions are counted in 32 bits


def bags_are_valid(
    ids: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    num_features: int,
    limits: Limits | None,
) -> bool:
    """Whether a batch is well formed: offsets rise from 0 to L, ids lie below limits[f], weights are finite.

    Args:
        ids: [L] int64.
        offsets: [F * B + 1] int64.
        weights: [L] float32, or ``None``.
        num_features: F.
        limits: F numbers, or ``None`` to leave the ids alone.

    Returns:
        ``False`` also where the pass cannot be made: other devices and dtypes, no compiler, torch.compile.
    """
    if torch.compiler.is_compiling():
        return False
    place = 0 if limits is None else ctypes.addressof(limits)
    if loaded:
        address = attempt("check_bags", check_address)
        return address is not None and loaded[0].bags_are_valid(
            address, ids, offsets, weights, num_features, place
        )
    if not (_reads(ids, torch.int64) and _reads(offsets, torch.int64)):
        return False
    num_ids, bags = ids.numel(), offsets.numel() - 1
    if not num_features or bags < 0 or bags % num_features or max(num_ids, bags + 1) > MOST:
        return False
    if weights is not None and not (_reads(weights, torch.float32) and weights.numel() == num_ids):
        return False
    library = attempt("check_bags", driver)
    return library is not None and not library.recemb_tree_check(
        ids.data_ptr(),
        offsets.data_ptr(),
        None if weights is None else weights.data_ptr(),
        num_ids,
        num_features,
        bags // num_features,
        place,
        torch.get_num_threads(),
    )


@cache
def check_address() -> int:
    """Of the driver's check.

    Raises:
        KernelUnavailableError: it cannot be compiled here.
    """
    return ctypes.cast(driver().recemb_tree_check, ctypes.c_void_p).value or 0


def _reads(given: Tensor, dtype: torch.dtype) -> bool:
    return given.is_cpu and given.dtype is dtype and given.dim() == 1 and given.is_contiguous()
