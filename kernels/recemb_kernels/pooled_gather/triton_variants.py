"""Compile-time constants of the kernels of paired rows, and the variants of them that are shipped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from recemb_kernels.aot.configuration import Configuration
from recemb_kernels.pooled_gather import Operation, RowShape
from recemb_kernels.pooled_gather.triton_kernel import pair_rows, pool_pairs, split_rows, sum_sides
from recemb_kernels.triton_frame.elements import ELEMENTS, KEYS, NAMES, as_compiled, tile_of

# Most columns, and elements, of a program's tile; twice as many spill registers.
_TILE = (128, 512)


def pool_constants(shape: RowShape, dtype: torch.dtype, weighted: bool) -> dict[str, Any]:
    """Of ``pool_pairs``."""
    bags, block = tile_of(shape.dim, *_TILE)
    return {**_pair(shape, dtype), "WEIGHTED": weighted, "BB": bags, "BD": block, "num_warps": 4}


def pair_constants(shape: RowShape, dtype: torch.dtype) -> dict[str, Any]:
    """Of ``pair_rows``."""
    rows, block = tile_of(shape.dim, *_TILE)
    return {**_pair(shape, dtype), "BR": rows, "BD": block, "num_warps": 4}


def _pair(shape: RowShape, dtype: torch.dtype) -> dict[str, Any]:
    left, right = shape.widths
    operation = int(shape.operation)
    return {"OPERATION": operation, "LEFT": left, "RIGHT": right, "W": shape.dim, "ELEMENT": ELEMENTS[dtype]}


def side_constants(shape: RowShape, dtype: torch.dtype, which: int) -> dict[str, Any]:
    """Of ``sum_sides``, for the quotients' side, 0, or the remainders', 1."""
    pieces, block = tile_of(shape.widths[which], *_TILE)
    return {
        "ORDERED": which == 1,
        "FACTOR": shape.operation == Operation.MULT,
        "W": shape.dim,
        "FROM": shape.widths[0] if which and shape.operation == Operation.CONCAT else 0,
        "WIDTH": shape.widths[which],
        "ELEMENT": ELEMENTS[dtype],
        "BP": pieces,
        "BD": block,
        "num_warps": 4,
    }


def split_constants(shape: RowShape, dtype: torch.dtype, num_tables: int) -> dict[str, Any]:
    """Of ``split_rows``."""
    left, right = (width * dtype.itemsize for width in shape.widths)
    steps = num_tables.bit_length()
    return {"LEFT_BYTES": left, "RIGHT_BYTES": right, "STEPS": steps, "BR": 256, "num_warps": 4}


_TYPES = {
    **dict.fromkeys(("out", "weights", "grad_rows"), "*fp32"),
    **dict.fromkeys(("batch_size", "columns", "num_ids", "num_tables", "count"), "i32"),
    **dict.fromkeys(("piece_first", "run_piece"), "*i32"),
}
_FLOAT, _HALF = torch.float32, torch.bfloat16
# Operation, D and type; the first of them with weights too.
_SHIPPED = (
    (Operation.MULT, 64, _FLOAT),
    (Operation.MULT, 16, _FLOAT),
    (Operation.MULT, 128, _FLOAT),
    (Operation.MULT, 64, _HALF),
    (Operation.MULT, 64, torch.float16),
    (Operation.ADD, 64, _FLOAT),
    (Operation.CONCAT, 64, _FLOAT),
    (Operation.CONCAT, 128, _HALF),
)


def shipped() -> list[Configuration]:
    """What is compiled ahead of time in CI. A look-up is a bag of one id, or a distinct row that shares no
    part with another."""
    found = []
    for operation, dim, dtype in _SHIPPED:
        halves = (dim // 2, dim // 2) if operation == Operation.CONCAT else (dim, dim)
        shape = RowShape(operation, (1, 1), halves)
        found += list(_forward(shape, dtype, (operation, dim, dtype) == _SHIPPED[0]))
        found += list(_backward(shape, dtype))
    descriptors = ("cuts", "first_key", "table_keys", "radices", "left_keys", "right_keys", "lefts", "rights")
    split = split_constants(RowShape(Operation.MULT, (1, 1), (64, 64)), _FLOAT, 26)
    for keys, size in KEYS:
        last = Configuration(
            kernel="pooled_gather.split_rows",
            dtype="float32",
            **as_compiled(split_rows, split, {**_TYPES, "row_key": keys}),
            flops_per_lookup=0.0,
            bytes_per_lookup=size + 32.0,
            min_occupancy=0.5,
            note=f"26 tables, {8 * size}-bit keys",
            small=descriptors,
        )
        found.append(last)
    return found


def _forward(shape: RowShape, dtype: torch.dtype, weights: bool) -> Iterator[Configuration]:
    name, size = NAMES[dtype][0], dtype.itemsize
    parts, adds = sum(shape.widths) * size, 0 if shape.operation == Operation.CONCAT else shape.dim
    for weighted in (False, True) if weights else (False,):
        yield Configuration(
            kernel="pooled_gather.pool_pairs",
            dtype=name,
            **as_compiled(pool_pairs, pool_constants(shape, dtype, weighted), _TYPES),
            flops_per_lookup=float(adds + (1 + weighted) * shape.dim),
            bytes_per_lookup=parts + 4.0 * shape.dim + 16 + 4 * weighted,
            min_occupancy=0.5,
            note=_note(shape) + (", weighted" if weighted else ""),
            small=("lefts", "rights", "features", "pairs"),
        )


def _backward(shape: RowShape, dtype: torch.dtype) -> Iterator[Configuration]:
    name, size = NAMES[dtype][0], dtype.itemsize
    if dtype is torch.float16:
        return  # differs from bfloat16 in nothing but the name of an instruction
    for which, side in enumerate(("quotients", "remainders")):
        width, factor = shape.widths[which], shape.operation == Operation.MULT
        if shape.operation == Operation.ADD and which:
            continue  # the same but for the order
        yield Configuration(
            kernel="pooled_gather.sum_sides",
            dtype=name,
            **as_compiled(sum_sides, side_constants(shape, dtype, which), _TYPES),
            flops_per_lookup=width * (1.0 + factor),
            bytes_per_lookup=width * (8.0 + size * factor) + 8 + 8 * factor + 8 * which,
            min_occupancy=0.5,
            note=f"{_note(shape)}, {side}",
            small=("cuts",),
        )
    if shape.operation != Operation.ADD:
        # For gradients of weights.
        yield Configuration(
            kernel="pooled_gather.pair_rows",
            dtype=name,
            **as_compiled(pair_rows, pair_constants(shape, dtype), _TYPES),
            flops_per_lookup=float(shape.dim if shape.operation == Operation.MULT else 0),
            bytes_per_lookup=float(sum(shape.widths)) * size + 4 * shape.dim + 16,
            min_occupancy=0.5,
            note=_note(shape),
            small=("cuts",),
        )


def _note(shape: RowShape) -> str:
    return f"{shape.operation.name.lower()}, D={shape.dim}"
