"""Compile-time constants of the tensor-train kernels, and the warps and stages that they are tried with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from recemb_kernels.triton_frame.elements import ELEMENTS, factor, precision, tile, tuned
from recemb_kernels.triton_frame.launches import PIECE
from recemb_kernels.tt_gather import TrainShape
from recemb_kernels.tt_gather.triton_kernel import (
    multiply,
    slice_gradient,
)

# Rows of a matrix product that one program takes; plans count in them.
TILE_ROWS = 32
# Of kernels that share out what the host knows but a bound of: a few for each place on a GPU.
MOST_PROGRAMS = 2**14
# Arrays of levels lie one behind the other: each begins at a multiple of 16 bytes, as Triton likes them.
ALIGNED = 4


# (Warps, pipeline stages) of a product.
_DOT, BACK, LONG, SHORT = ((8, 2), (8, 3)), (4, 2), (2, 2), (1, 2)  # the last three live in registers
EVERY = (*_DOT, BACK, LONG, SHORT)


def multiply_variants(constants: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """Warps and pipeline stages of ``multiply`` that are tried at the first product of each shape.

    Triton pipelines the operands of ``tl.dot`` alone. Plain tiles are narrow, and each warp more repeats the
    addresses: one is the fastest (kernels/README.md), but beyond K = 32 it spills, and beyond 64 two do where
    rows of 3, 5 or 7 columns are loaded one by one. In exact products with a slice's transpose a third stage
    spills, and four warps are faster than eight.
    """
    if not constants["DOT"]:
        if constants["K"] <= 32:
            return (SHORT,)
        return (BACK,) if constants["K"] > 64 and constants["N"] in (3, 5, 7) else (LONG,)
    if constants["FORWARD"] or constants["PRECISION"] != "ieee":
        return _DOT
    # Whole loads of 16 bytes that end within the second tile: on sm_80 four warps spill.
    return _DOT[:1] if constants["K"] in (40, 48, 56) and 16 < constants["N"] <= 32 else (BACK,)


def gradient_variants(constants: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """The same of ``slice_gradient``."""
    return _DOT if constants["DOT"] else _DOT[:1]


multiply_tuned = tuned(multiply, ("FORWARD", "PRECISION", "Q", "K", "N"), EVERY, multiply_variants)
slice_gradient_tuned = tuned(
    slice_gradient, ("PRECISION", "Q", "K", "N"), EVERY, gradient_variants, restore=("grad",)
)


@dataclass(frozen=True)
class Tiles:
    """How one matrix product [M, K] [K, N] is tiled.

    ``dot`` says that ``tl.dot`` computes it: K and N of 8 and more are padded to the 16 that it takes, which
    at most quadruples the work; tensor cores have more than that to spare. Narrower ones, as of a last core
    with q_d < 8, are plain multiply-adds.
    """

    dot: bool
    k: int
    n: int

    @classmethod
    def of(cls, inner: int, outer: int) -> Tiles:
        """Tiles for K = ``inner`` and N = ``outer``."""
        if min(inner, outer) >= 8:
            return cls(True, tile(inner, 32, 16), tile(outer, 64, 16))
        k = tile(inner, 32)
        return cls(False, k, tile(outer, max(1, 128 // k)))


def product_of(shape: TrainShape, k: int) -> tuple[int, int, int]:
    """(Q, K, N) of the products of level k: columns of a prefix, rank before the core, columns of a slice."""
    columns = math.prod(shape.dim_shape[:k])
    return columns, shape.ranks[k], shape.dim_shape[k] * shape.ranks[k + 1]


def multiply_constants(shape: TrainShape, k: int, dtype: torch.dtype, forward: bool) -> dict[str, Any]:
    """The constants of ``multiply`` at level k, on the way there or back."""
    q, inner, outer = product_of(shape, k)
    inner, outer = (inner, outer) if forward else (outer, inner)
    tiles = Tiles.of(inner, outer)
    return {
        "FORWARD": forward,
        "DOT": tiles.dot,
        "PRECISION": precision(dtype),
        "Q": q,
        "K": inner,
        "N": outer,
        "ELEMENT": ELEMENTS[dtype],
        # Gradients keep float32's exponents: float16 would lose the small ones.
        "COMPUTE": factor(dtype) if forward else tl.float32,
        "BM": TILE_ROWS,
        "BK": tiles.k,
        "BN": tiles.n,
    }


def gradient_constants(shape: TrainShape, k: int, dtype: torch.dtype) -> dict[str, Any]:
    """The constants of ``slice_gradient`` at level k."""
    q, inner, outer = product_of(shape, k)
    tiles = Tiles.of(inner, outer)
    return {
        "DOT": tiles.dot,
        "PRECISION": precision(dtype),
        "Q": q,
        "K": inner,
        "N": outer,
        "BM": TILE_ROWS,
        "BK": tiles.k,
        "BN": tiles.n,
    }


def children_constants(shape: TrainShape, dtype: torch.dtype) -> dict[str, Any]:
    """The constants of ``sum_children``, which comes back from rows."""
    q, inner, outer = product_of(shape, len(shape.dim_shape) - 1)
    columns = tile(q, 2 * q)
    block = tile(inner, max(8, _CHILDREN_TILE // columns))
    # Sixteen loads a row, or a short row's, take more than half of a place's registers in fewer warps.
    least = 2 if inner < 8 and (outer < 4 or columns >= 32) else 1
    stored = shape.stores_shares
    return {
        "SHARES": stored,
        "Q": q,
        "K": inner,
        # Shares are sums of float32, whatever the slices are.
        "N": 1 if stored else outer,
        "ELEMENT": tl.float32 if stored else ELEMENTS[dtype],
        "PIECE": PIECE,
        # Up to 16 loads of each factor under way at once; rows of 8 columns and more are loads enough.
        "BC": 8 if stored else 16 // outer if outer < 8 else 1,
        "BQ": columns,
        "BK": block,
        "num_warps": min(4, max(least, columns * block // (128 if stored or outer <= 8 else 64))),
    }


def join_constants(shape: TrainShape) -> dict[str, Any]:
    """The constants of ``join_children``."""
    q, inner, _ = product_of(shape, len(shape.dim_shape) - 1)
    block = tile(q * inner, 512)
    return {"W": q * inner, "PIECE": PIECE, "BC": 8, "BW": block, "num_warps": min(4, max(1, block // 128))}


def slice_block(width: int) -> dict[str, int]:
    """Tile and warps of the kernels that copy or add whole slices."""
    block = tile(width, 1024)
    return {"BW": block, "num_warps": 1 if block <= 64 else 4}


def digit_constants(order: int, num_tables: int) -> dict[str, int]:
    """Of ``split_digits``."""
    # Two rows a thread spill registers from four cores on.
    rows = 256 if order < 4 else 128
    return {"ORDER": order, "STEPS": num_tables.bit_length(), "BR": rows, "num_warps": 4}


def count_constants(order: int) -> dict[str, int]:
    """Of ``count_nodes``."""
    return {"ORDER": order, "BL": _NODE_BLOCK, "num_warps": 4}


def aligned(numel: int) -> int:
    """``numel`` or a few more."""
    return -(-numel // ALIGNED) * ALIGNED


def node_constants(order: int) -> dict[str, int]:
    """Of ``place_nodes``."""
    # Two rows a thread take too many registers.
    return {"ORDER": order, "ALIGNED": ALIGNED, "BL": _NODE_BLOCK, "BB": _NODE_BLOCK, "num_warps": 16}


def group_constants(count: int) -> dict[str, int]:
    """Of ``group_bounds``."""
    return {"STEPS": count.bit_length(), "TILE": TILE_ROWS, "BG": 128, "num_warps": 4}


def find_constants(num_groups: int) -> dict[str, int]:
    """Of ``find_groups``."""
    return {"STEPS": (num_groups + 1).bit_length(), "BT": 256, "num_warps": 4}


def touched_constants() -> dict[str, int]:
    """Of ``mark_touched``."""
    return {"BE": 128, "num_warps": 4}


_NODE_BLOCK = 512
# Elements of a program's tile of ``sum_children``, four for each thread.
_CHILDREN_TILE = 512
