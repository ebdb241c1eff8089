"""Types and tile sizes of the kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def tile(width: int, most: int, least: int = 1) -> int:
    """The power of two that holds ``width``, between ``least`` and ``most``."""
    return max(least, min(most, triton.next_power_of_2(width)))


def cdiv(numerator: int, denominator: int) -> int:
    """ceil(numerator / denominator)."""
    return -(-numerator // denominator)


def factor(dtype: torch.dtype) -> tl.dtype:
    """What ``tl.dot`` multiplies of a table stored in ``dtype``; it adds up in float32.

    Triton's interpreter takes bfloat16 for the integers that hold its bits; float32 gives the same products.
    """
    interpreted = dtype is torch.bfloat16 and triton.knobs.runtime.interpret
    return tl.float32 if interpreted else ELEMENTS[dtype]


def precision(dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies float32 operands.

    Exactly for float32 tables, unless the user has allowed torch's own products to round to TF32. The others
    are stored with no more than TF32's 10 bits of mantissa.
    """
    exact = dtype is torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    return "ieee" if exact else "tf32"
