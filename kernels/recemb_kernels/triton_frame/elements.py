"""Types and tile sizes of the kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

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
