"""Compile-time constants of the kernels of shared arrays, and the variants of them that are shipped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from recemb_kernels.aot.configuration import Configuration
from recemb_kernels.robe_gather import RobeShape
from recemb_kernels.robe_gather.triton_kernel import (
    join_halves,
    match_rows,
    place_blocks,
    pool_blocks,
    read_rows,
    sum_blocks,
)
from recemb_kernels.triton_frame.elements import (
    ELEMENTS,
    KEYS,
    NAMES,
    as_compiled,
    cdiv,
    tile,
    tile_of,
    tile_or_half,
)

# Elements of a program's tile of pooled bags: twice as many take 160 registers a thread.
_POOL_AREA = 512
# Most columns (of blocks for _PLACE_TILE), and elements, of a program's tile.
_PLACE_TILE = (64, 256)
_READ_TILE = (128, 1024)
_SUM_TILE = (128, 512)


def pool_constants(shape: RobeShape, dtype: torch.dtype, weighted: bool) -> dict[str, Any]:
    """Of ``pool_blocks``."""
    longest = min(shape.dim, shape.block_size)
    columns = tile(longest, 128)
    blocks = tile(cdiv(shape.dim, shape.block_size), 128 // columns)
    return {
        **_blocks(shape),
        "D": shape.dim,
        "Z": shape.block_size,
        "WEIGHTED": weighted,
        "ELEMENT": ELEMENTS[dtype],
        "BB": max(1, _POOL_AREA // (columns * blocks)),
        "BK": blocks,
        "BZ": columns,
        "CHUNKS": cdiv(longest, columns),
    }


def place_constants(shape: RobeShape, num_tables: int) -> dict[str, Any]:
    """Of ``place_blocks``."""
    rows, blocks = tile_of(cdiv(shape.dim, shape.block_size), *_PLACE_TILE)
    return {**_blocks(shape), "STEPS": num_tables.bit_length(), "BR": rows, "BK": blocks}


def read_constants(shape: RobeShape, dtype: torch.dtype, num_arrays: int) -> dict[str, Any]:
    """Of ``read_rows``."""
    # Addresses of blocks of one element in rows of odd length: of one array, where the number of arrays is a
    # constant, a whole tile spills registers.
    halved = shape.block_size == 1 and shape.dim % 2 == 1
    rows, block = tile_or_half(shape.dim, _READ_TILE, halved)
    sizes = {"D": shape.dim, "Z": shape.block_size, "BR": rows, "BD": block}
    return {**_blocks(shape), **sizes, "ELEMENT": ELEMENTS[dtype], "STEPS": num_arrays.bit_length()}


def sum_constants(shape: RobeShape) -> dict[str, Any]:
    """Of ``sum_blocks``."""
    pieces, block = tile_of(2 * shape.block_size, *_SUM_TILE)
    return {**_blocks(shape), "D": shape.dim, "Z": shape.block_size, "BP": pieces, "BD": block}


def _blocks(shape: RobeShape) -> dict[str, Any]:
    return {"BLOCKS": cdiv(shape.dim, shape.block_size), "SIGNED": shape.signed, "num_warps": 4}


def match_constants(num_arrays: int, most: int) -> dict[str, Any]:
    """Of ``match_rows``, for at most ``most`` runs."""
    return {"ARRAY_STEPS": num_arrays.bit_length(), "STEPS": most.bit_length(), "BR": 128, "num_warps": 4}


def join_constants(block_size: int) -> dict[str, Any]:
    """Of ``join_halves``."""
    block = tile(block_size, 1024)
    return {"Z": block_size, "BZ": block, "num_warps": 1 if block <= 128 else 4}


_TYPES = {
    **dict.fromkeys(("out", "weights", "grad_rows", "sums"), "*fp32"),
    **dict.fromkeys(("start", "touched", "run_first", "piece_first", "run_piece"), "*i32"),
    **dict.fromkeys(("batch_size", "columns", "num_ids", "num_tables", "num_arrays", "count", "most"), "i32"),
    "negative": "*i8",
    "weights_of_all": "i32",
}
# D and Z; the first with weights, without signs and in 16 bits too.
_SHIPPED = ((64, 16), (16, 16), (64, 64), (128, 32), (128, 5))
_FLOAT = torch.float32


def shipped() -> list[Configuration]:
    """What is compiled ahead of time in CI. A look-up is a bag of one id, or a distinct row whose blocks
    start in array rows of their own."""
    found = []
    for dim, block_size in _SHIPPED:
        shape = _shape(dim, block_size, True)
        found += [_pool(shape, _FLOAT, False), _read(shape, _FLOAT), *_backward(shape)]
        if (dim, block_size) != (16, 16):  # whose kernel is that of (64, 16)
            found.append(_join(shape))
    shape, plain = (_shape(*_SHIPPED[0], signed) for signed in (True, False))
    found += [_pool(shape, _FLOAT, True), _pool(plain, _FLOAT, False)]
    found += [_pool(shape, dtype, False) for dtype in (torch.bfloat16, torch.float16)]
    blocks = cdiv(shape.dim, shape.block_size)
    last = Configuration(
        kernel="robe_gather.match_rows",
        dtype="float32",
        **as_compiled(match_rows, match_constants(4, 2**21), _TYPES),
        flops_per_lookup=0.0,
        # Two searches of 21 steps among the runs of all blocks, of which a cache holds the first.
        bytes_per_lookup=blocks * (2 * 36.0 + 40),
        min_occupancy=0.5,
        note=f"{_note(shape)}, 2M runs",
        small=("cuts", "array_rows"),
    )
    return [*found, _read(shape, torch.bfloat16), last]


def _pool(shape: RobeShape, dtype: torch.dtype, weighted: bool) -> Configuration:
    return Configuration(
        kernel="robe_gather.pool_blocks",
        dtype=NAMES[dtype][0],
        **as_compiled(pool_blocks, pool_constants(shape, dtype, weighted), _TYPES),
        flops_per_lookup=2.0 * shape.dim,
        bytes_per_lookup=shape.dim * (dtype.itemsize + 4.0) + 16 + 4 * weighted,
        min_occupancy=0.25,
        note=_note(shape) + (", weighted" if weighted else ""),
        small=("arrays", "tables", "features", "lookups"),
    )


def further() -> list[Configuration]:
    """Rows of odd length in blocks of one element of one array, whose number Triton makes a constant."""
    found = []
    for dtype in NAMES:
        c = _read(_shape(5, 1, False), dtype)
        signature = {name: kind for name, kind in c.signature.items() if name != "num_arrays"}
        found.append(
            replace(c, signature=signature, constants={**c.constants, "num_arrays": 1}, listed=False)
        )
    return found


def _read(shape: RobeShape, dtype: torch.dtype) -> Configuration:
    """For gradients of weights."""
    blocks = cdiv(shape.dim, shape.block_size)
    return Configuration(
        kernel="robe_gather.read_rows",
        dtype=NAMES[dtype][0],
        **as_compiled(read_rows, read_constants(shape, dtype, 4), _TYPES),
        flops_per_lookup=0.0,
        bytes_per_lookup=shape.dim * (dtype.itemsize + 4.0) + 5 * blocks,
        min_occupancy=0.25,
        note=_note(shape),
        small=("arrays", "array_rows", "cuts"),
    )


def _backward(shape: RobeShape) -> Iterator[Configuration]:
    blocks, size = cdiv(shape.dim, shape.block_size), shape.block_size
    for keys, nbytes in KEYS:
        yield Configuration(
            kernel="robe_gather.place_blocks",
            dtype="float32",
            note=f"{_note(shape)}, {8 * nbytes}-bit keys",
            **as_compiled(place_blocks, place_constants(shape, 26), {**_TYPES, "row_key": keys}),
            flops_per_lookup=0.0,
            bytes_per_lookup=nbytes + 5.0 * blocks,
            min_occupancy=0.5,
            small=("cuts", "first_key", "table_keys", "tables"),
        )
    yield Configuration(
        kernel="robe_gather.sum_blocks",
        dtype="float32",
        note=_note(shape),
        **as_compiled(sum_blocks, sum_constants(shape), _TYPES),
        flops_per_lookup=float(shape.dim),
        bytes_per_lookup=4.0 * shape.dim + blocks * (8 * size + 8 + 4 + 1 + 8),
        min_occupancy=0.5,
        small=("cuts",),
    )


def _join(shape: RobeShape) -> Configuration:
    blocks, size = cdiv(shape.dim, shape.block_size), shape.block_size
    return Configuration(
        kernel="robe_gather.join_halves",
        dtype="float32",
        **as_compiled(join_halves, join_constants(size), _TYPES),
        # Every block touches two array rows.
        flops_per_lookup=2.0 * blocks * size,
        bytes_per_lookup=2.0 * blocks * (8 * size + 20),
        min_occupancy=0.5,
        note=_note(shape),
        small=("cuts",),
    )


def _shape(dim: int, block_size: int, signed: bool) -> RobeShape:
    return RobeShape(dim, block_size, 1, signed, (0, 0), (0, 0), (0,), (), 1)


def _note(shape: RobeShape) -> str:
    return f"D={shape.dim}, Z={shape.block_size}" + ("" if shape.signed else ", no signs")
