"""``recemb::pooled_gather``: pool bags of stored rows of any number of tables in one call.

    out[b, columns of feature f] = sum over the bag of w * row(i)
    row(i) = E[i], or E_q[i // c] * E_r[i mod c], E_q[i // c] + E_r[i mod c], both concatenated, or E[i] P

Parameters come table by table: E [N, D], or E_q [ceil(N / c), D_q] then E_r [c, D_r], or E [N, d] then
P [d, D], in float32. A projection is applied to the pooled bags, which is the same and cheaper. The schema is
that of every gather op (:mod:`recemb_kernels.gather_op`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path

from recemb_kernels.build import load
from recemb_kernels.digit_tree.group import TableKernel
from recemb_kernels.gather_op import GatherOp
from recemb_kernels.storage import Stored, constants_of

__all__ = ["MAX_RADIX", "Operation", "RowShape", "encode", "pooled_gather"]

# Row numbers within one parameter are 32-bit in the plan.
MAX_RADIX = 2**31 - 1


class Operation(IntEnum):
    """How a row is made of its parts, in ``cpu.cpp``'s numbering."""

    ROW = 0
    MULT = 1
    ADD = 2
    CONCAT = 3
    PROJECT = 4


@dataclass(frozen=True)
class RowShape:
    """One table: its operation, and rows and width of each parameter (one for ``ROW``, else two)."""

    operation: Operation
    rows: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def dim(self) -> int:
        """D."""
        left, right = (self.widths * 2)[:2]
        return {Operation.CONCAT: left + right, Operation.PROJECT: right}.get(self.operation, left)


def encode(shapes: Sequence[RowShape]) -> tuple[int, ...]:
    """The op's flat code of its tables."""
    return tuple(
        x for shape in shapes for x in (shape.operation, *(shape.rows * 2)[:2], *(shape.widths * 2)[:2])
    )


def _decode(flat: tuple[int, ...]) -> list[RowShape]:
    shapes = []
    for operation, q, r, left, right in zip(*[iter(flat)] * 5, strict=True):
        parts = 1 if operation == Operation.ROW else 2
        shapes.append(RowShape(Operation(operation), (q, r)[:parts], (left, right)[:parts]))
    return shapes


def _kernel(shape: RowShape, stored: Stored = ()) -> TableKernel:
    left, right = (shape.widths * 2)[:2]
    return TableKernel(
        library=_library(shape.operation, left, right, stored),
        dim=shape.dim,
        # The rows of a projection are its own, not digits of an id.
        radices=shape.rows[:1] if shape.operation == Operation.PROJECT else shape.rows,
        parameters=len(shape.rows),
    )


@cache
def _library(operation: Operation, left: int, right: int, stored: Stored) -> ctypes.CDLL:
    sizes = {"OPERATION": int(operation), "LEFT": left, "RIGHT": right}
    constants: dict[str, int | str] = {**sizes, **constants_of(stored)}
    return load("pooled_table", [Path(__file__).parent / "cpu.cpp"], constants)


pooled_gather = GatherOp(
    "pooled_gather", encode, _decode, _kernel, "recemb_kernels.pooled_gather.triton_rows:RowFamily"
)
