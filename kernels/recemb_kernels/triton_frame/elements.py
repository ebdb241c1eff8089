"""Types and tile sizes of the kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

# Name, kernel, types of the arguments, constants and warps of what is compiled ahead of time.
Variant = tuple[str, Any, dict[str, str], dict[str, Any], int]
ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def tile(width: int, most: int, least: int = 1) -> int:
    """The power of two that holds ``width``, between ``least`` and ``most``."""
    return max(least, min(most, triton.next_power_of_2(width)))


def tile_of(width: int, most: int, area: int) -> tuple[int, int]:
    """Rows and columns of a program's tile of about ``area`` elements, of at most ``most`` columns."""
    columns = tile(width, most)
    return max(1, area // columns), columns


def cdiv(numerator: int, denominator: int) -> int:
    """ceil(numerator / denominator)."""
    return -(-numerator // denominator)


def precision(dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies float32 operands.

    Exactly for float32 tables, unless the user has allowed torch's own products to round to TF32. The others
    are stored with no more than TF32's 10 bits of mantissa.
    """
    exact = dtype is torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    return "ieee" if exact else "tf32"


def variant(
    name: str, kernel: Any, constants: dict[str, Any], types: Mapping[str, str], num_warps: int = 4
) -> Variant:
    """A kernel to compile; arguments without a type of their own are int64 arrays."""
    signature = {arg: types.get(arg, "*i64") for arg in kernel.arg_names if arg not in constants}
    return name, kernel, signature, constants, num_warps
