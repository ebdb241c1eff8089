"""Compile-time constants, tiles and warps of the frame's kernels.

Launches and the list of what is compiled ahead of time take them from here, so that what CI compiles is what
runs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from recemb_kernels.triton_frame.elements import ELEMENTS, tile, tile_of, tile_or_half
from recemb_kernels.update import Kind

# Positions of one row that are summed by one program; longer rows are sums of such pieces.
PIECE = 64
# Most columns, and elements, of a program's tile; twice as many spill registers.
POOL_TILE = (128, 512)
WEIGH_TILE = (64, 512)
PIECE_TILE = (128, 512)
_JOIN_TILE = (256, 512)
_UPDATE_TILE = (1024, 512)
# Widths that take less, as compiling them for both architectures has shown.
_NARROW, _WIDE = 4, 128
# Positions of a piece, and rows of a segment, that are fetched at once.
_AT_ONCE, _ROWS_AT_ONCE = 4, 8


def check_constants(num_bags: int, weighted: bool) -> dict[str, Any]:
    """Of ``check_batch``."""
    # Four positions a thread take too many registers.
    return {"WEIGHTED": weighted, "STEPS": (num_bags + 1).bit_length(), "BL": 256, "num_warps": 4}


def mark_constants() -> dict[str, Any]:
    """Of ``mark_infinite``."""
    return {"BL": 2048, "num_warps": 4}


def key_constants(num_bags: int) -> dict[str, Any]:
    """Of ``place_ids``."""
    return {"STEPS": (num_bags + 1).bit_length(), "BL": 512, "num_warps": 4}


def run_constants(whole: bool, inverse: bool) -> dict[str, Any]:
    """Of ``number_runs``; ``count_runs`` takes some of them."""
    # Each block adds up what those before it count: that grows with the square of how many there are.
    blocks = {"PIECE": PIECE, "BL": 512, "BB": 512}
    return {"WHOLE": whole, "INVERSE": inverse, **blocks, "num_warps": 16}


def pool_constants(
    width: int, weighted: bool, dtype: torch.dtype | None, turns: bool = False
) -> dict[str, Any]:
    """Of ``pool_rows``; ``dtype`` is that of sources given by address."""
    most, area = POOL_TILE
    warps = 4
    if _is_uneven(width):
        most, area = most // 2, area // 2
    if turns:
        # As many elements a thread; with turns four warps spill registers, and of uneven rows two.
        warps = 1 if _is_uneven(width) else 2
        most = most // 2 if width > _WIDE else most
    bags, block = tile_of(width, most, area * warps // 4)
    tiles = {"D": width, "WEIGHTED": weighted, "BB": bags, "BD": block}
    return {**_source(dtype), "TURNS": turns, **tiles, "num_warps": warps}


def weigh_constants(width: int, dtype: torch.dtype | None) -> dict[str, Any]:
    """Of ``weight_gradients``."""
    # A row wider than the tile is a loop, which keeps more alive; other uneven rows need no less.
    positions, block = tile_or_half(width, WEIGH_TILE, width <= _NARROW or width > _WIDE)
    return {**_source(dtype), "D": width, "BL": positions, "BD": block, "num_warps": 4}


def _is_uneven(width: int) -> bool:
    """Whether a thread spends registers on each element: an address, as four columns cannot be one load of
    16 bytes, or what a row has of its own, as rows are so narrow that a tile has very many."""
    return width <= _NARROW or width % 4 != 0


def _source(dtype: torch.dtype | None) -> dict[str, Any]:
    indirect = dtype is not None
    element = tl.float32 if dtype is None else ELEMENTS[dtype]
    return {"LIMITS": 2 if indirect else 0, "INDIRECT": indirect, "ELEMENT": element}


def find_constants(scaled: bool, weighted: bool) -> dict[str, Any]:
    """Of ``find_gradients``."""
    return {"SCALED": scaled, "WEIGHTED": weighted, "BL": 256, "num_warps": 4}


def place_constants(dim: int, scaled: bool, relative: bool) -> dict[str, Any]:
    """Of ``sum_places``."""
    rows, block = tile_or_half(dim, PIECE_TILE, _is_uneven(dim))
    tiles = {"BP": rows, "BI": _AT_ONCE, "BD": block}
    own = {"SCALED": scaled, "RELATIVE": relative, "PIECE": PIECE, "D": dim}
    return {**own, **tiles, "num_warps": 4}


def join_constants(dim: int, relative: bool) -> dict[str, Any]:
    """Of ``join_places``."""
    cuts, block = tile_or_half(dim, _JOIN_TILE, _is_uneven(dim))
    tiles = {"BN": cuts, "BC": _ROWS_AT_ONCE, "BD": block}
    return {"RELATIVE": relative, "PIECE": PIECE, "D": dim, **tiles, "num_warps": 4}


def segment_constants(width: int, relative: bool) -> dict[str, Any]:
    """Of ``segment_sum``."""
    segments, block = tile_or_half(width, _JOIN_TILE, _is_uneven(width))
    tiles = {"BN": segments, "BC": _ROWS_AT_ONCE, "BW": block}
    return {"RELATIVE": relative, "W": width, **tiles, "num_warps": 4}


def update_constants(kind: Kind, width: int, dtype: torch.dtype, state: torch.dtype | None) -> dict[str, Any]:
    """Of ``update_rows``."""
    entries, block = tile_or_half(width, _UPDATE_TILE, _is_uneven(width))
    return {
        "KIND": int(kind),
        "W": width,
        "ELEMENT": ELEMENTS[dtype],
        "STATE": ELEMENTS[state or torch.float32],
        "BE": entries,
        "BW": block,
        "num_warps": 4,
    }


def scatter_constants(width: int) -> dict[str, Any]:
    """Of ``scatter_rows``."""
    block = tile(width, 1024)
    return {"W": width, "BW": block, "num_warps": 1 if block <= 128 else 4}


def locate_constants(num_tables: int) -> dict[str, Any]:
    """Of ``locate``."""
    return {"STEPS": num_tables.bit_length(), "BR": 256, "num_warps": 4}
