"""``recemb::robe_gather``: pool bags of ROBE rows of any number of shared arrays in one call.

    out[b, columns of feature f] = sum over the bag of w * row(e, x)
    row(e, x)[j] = g(e, x, j // Z) * M[(h(e, x, j // Z) mod |M| + j mod Z) mod |M|]

The tables of one array are one table of the driver; a feature's key base tells them apart. The schema is that
of every gather op (:mod:`recemb_kernels.gather_op`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from recemb_kernels.build import QUICK, load
from recemb_kernels.digit_tree.group import Plan, TableKernel
from recemb_kernels.gather_op import GatherOp
from recemb_kernels.storage import Stored, constants_of

__all__ = ["RobeShape", "encode", "robe_gather"]

# Numbers of an array's code before its key bases.
_HEAD = 11


@dataclass(frozen=True)
class RobeShape:
    """One shared array and the hashes of its tables, all of one dim.

    Args:
        dim: D.
        block_size: Z.
        rows: |M| / Z.
        signed: whether blocks carry a hashed sign.
        slot, sign: coefficients B and Q of the two hashes.
        key_bases: per table, rising, what its features add to their ids.
        offsets: per table, (A e + C b + D) mod P of each block's slot, then of each block's sign.
        num_keys: one past the largest id plus key base; on GPU keys of several arrays are told apart by it.
    """

    dim: int
    block_size: int
    rows: int
    signed: bool
    slot: tuple[int, int]
    sign: tuple[int, int]
    key_bases: tuple[int, ...]
    offsets: tuple[int, ...]
    num_keys: int


def encode(shapes: Sequence[RobeShape]) -> tuple[int, ...]:
    """The op's flat code of its arrays."""
    flat: list[int] = []
    for s in shapes:
        flat += [s.dim, s.block_size, s.rows, s.signed, *s.slot, *s.sign, s.num_keys]
        flat += [len(s.key_bases), len(s.offsets), *s.key_bases, *s.offsets]
    return tuple(flat)


def _decode(flat: tuple[int, ...]) -> list[RobeShape]:
    shapes, at = [], 0
    while at < len(flat):
        first = at + _HEAD
        dim, block_size, rows, signed, b, q, sign_b, sign_q, num_keys, tables, offsets = flat[at:first]
        bases, end = first + tables, first + tables + offsets
        shapes.append(
            RobeShape(
                dim,
                block_size,
                rows,
                bool(signed),
                (b, q),
                (sign_b, sign_q),
                flat[first:bases],
                flat[bases:end],
                num_keys,
            )
        )
        at = end
    return shapes


def _kernel(shape: RobeShape, stored: Stored = ()) -> TableKernel:
    return TableKernel(
        library=_library(shape.dim, shape.block_size, shape.signed, stored),
        dim=shape.dim,
        # Keys are not digits: blocks are grouped by hashed place, in the kernel.
        radices=(0,),
        parameters=1,
        # A row of one block is added to the array as it comes; rows of several are made distinct first.
        plan=Plan.NEVER if shape.block_size >= shape.dim else Plan.BACKWARD,
        constants=(
            *(shape.rows, len(shape.key_bases)),
            *(*shape.slot, *shape.sign),
            *(*shape.key_bases, *shape.offsets),
        ),
    )


@cache
def _library(dim: int, block_size: int, signed: bool, stored: Stored) -> ctypes.CDLL:
    sizes = {"DIM": dim, "BLOCK": block_size, "SIGNED": int(signed)}
    constants: dict[str, int | str] = {**sizes, **constants_of(stored)}
    return load("robe_table", [Path(__file__).parent / "cpu.cpp"], constants, QUICK)


robe_gather = GatherOp(
    "robe_gather", encode, _decode, _kernel, "recemb_kernels.robe_gather.triton_blocks:BlockFamily"
)
