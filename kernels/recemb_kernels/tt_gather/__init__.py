"""``recemb::tt_gather``: pool bags of rows of any number of tensor-train tables in one call.

    out[b, columns of feature f] = sum over the bag of w * G_1[i_1] G_2[i_2] ... G_d[i_d]

Cores come table by table, each [p_k, R_{k-1} q_k R_k] in float32. The schema is that of every gather op
(:mod:`recemb_kernels.gather_op`).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from recemb_kernels.build import QUICK, load
from recemb_kernels.digit_tree.group import MAX_ORDER, Plan, TableKernel
from recemb_kernels.gather_op import GatherOp
from recemb_kernels.storage import Stored, constants_of

__all__ = ["MAX_ORDER", "TrainShape", "encode", "tt_gather"]


@dataclass(frozen=True)
class TrainShape:
    """One table's train: p, q and R_0 .. R_d."""

    row_shape: tuple[int, ...]
    dim_shape: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def dim(self) -> int:
        """D."""
        return math.prod(self.dim_shape)

    @property
    def stores_shares(self) -> bool:
        """Whether a GPU stores rows' shares of their parents' gradients on the way back, made slice by slice.

        Else a share, [q_1 .. q_(d-1), R_(d-1)], is computed as it is added up, which reads the row's slice,
        [R_(d-1), q_d], for every row; a share that is written and read again is less than that here.
        """
        return 2 * math.prod(self.dim_shape[:-1]) < self.dim_shape[-1]


def encode(shapes: Sequence[TrainShape]) -> tuple[int, ...]:
    """The op's flat code of its tables."""
    flat: list[int] = []
    for shape in shapes:
        flat += [len(shape.row_shape), *shape.row_shape, *shape.dim_shape, *shape.ranks]
    return tuple(flat)


def _decode(flat: tuple[int, ...]) -> list[TrainShape]:
    shapes, at = [], 0
    while at < len(flat):
        order = flat[at]
        rows, dims, end = at + 1, at + 1 + order, at + 2 + 3 * order
        shapes.append(TrainShape(flat[rows:dims], flat[dims : dims + order], flat[dims + order : end]))
        at = end
    return shapes


def _kernel(shape: TrainShape, stored: Stored = ()) -> TableKernel:
    mirrored = TrainShape(shape.row_shape[::-1], shape.dim_shape[::-1], shape.ranks[::-1])
    return TableKernel(
        library=_library(shape.dim_shape, shape.ranks, stored),
        dim=shape.dim,
        radices=shape.row_shape,
        parameters=len(shape.row_shape),
        plan=Plan.FORWARD,
        cost=_product_cost(shape),
        mirrored_cost=_product_cost(mirrored),
    )


def _product_cost(shape: TrainShape) -> tuple[float, ...]:
    """Multiply-adds of one product of cores 0 .. l, by l."""
    return tuple(
        float(math.prod(shape.dim_shape[: l + 1]) * shape.ranks[l] * shape.ranks[l + 1])
        for l in range(len(shape.dim_shape))
    )


@cache
def _library(dim_shape: tuple[int, ...], ranks: tuple[int, ...], stored: Stored) -> ctypes.CDLL:
    constants = {
        "DIMS": ",".join(map(str, dim_shape)),
        "RANKS": ",".join(map(str, ranks)),
        **constants_of(stored),
    }
    return load("tt_table", [Path(__file__).parent / "cpu.cpp"], constants, QUICK)


tt_gather = GatherOp(
    "tt_gather", encode, _decode, _kernel, "recemb_kernels.tt_gather.triton_train:TrainFamily"
)
