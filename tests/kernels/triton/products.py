"""Products of matrices as a GPU adds them up, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from triton.runtime.interpreter import TensorHandle


def as_tf32(operand: Any, nearest: bool) -> Any:
    """What is left of float32 with TF32's 10 bits of mantissa; the others are cut off, or rounded with
    ``nearest``, by the instructions of one GPU or another.
    """
    bits = np.ascontiguousarray(operand, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000 * nearest)) & np.uint32(0xFFFFE000)).view(np.float32)


def dot_of(read: Callable[[Any, str], Any] = lambda operand, precision: operand) -> Callable[..., Any]:
    """The interpreter's ``create_dot``: a chain of fused multiply-adds over K, which rounds more than
    numpy's sums.

    Args:
        read: what is multiplied of an operand, by its numbers and the precision that ``tl.dot`` is given.
    """

    def create_dot(_: Any, a: Any, b: Any, total: Any, precision: Any, *__: Any) -> Any:
        left, right = (read(x.data, precision.name).astype(np.float64) for x in (a, b))
        added = total.data
        for k in range(left.shape[1]):
            added = (left[:, k, None] * right[None, k] + added).astype(np.float32)
        return TensorHandle(added, total.dtype.scalar)

    return create_dot
