"""The nodes of every level of a batch's prefix tree, and their groups by core slice, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recemb_kernels.triton_frame import slice_rows
from recemb_kernels.triton_frame.elements import cdiv
from recemb_kernels.triton_frame.family import Call, Family
from recemb_kernels.tt_gather.triton_kernel import (
    count_nodes,
    find_groups,
    group_bounds,
    place_nodes,
    split_digits,
)
from recemb_kernels.tt_gather.triton_variants import (
    ALIGNED,
    TILE_ROWS,
    aligned,
    count_constants,
    digit_constants,
    find_constants,
    group_constants,
    node_constants,
)


@dataclass(frozen=True, eq=False)
class Groups:
    """The nodes of a level by core slice, part by part.

    Attributes:
        nodes: [N] nodes, int32, sorted by (part, slice).
        first: [S G + 1] where each group starts in ``nodes``.
        tile_first: [S G + 1] the same in tiles of ``TILE_ROWS`` rows.
        tile_group: the group of each tile, int32 where that will do.
    """

    nodes: Tensor
    first: Tensor
    tile_first: Tensor
    tile_group: Tensor


@dataclass(frozen=True, eq=False)
class Level:
    """The nodes of one level, numbered in the order of their rows; N is how many there are at most.

    S is how many parts they are computed in: micro-batches of rows; of nodes above them :func:`tree_parts`.

    Attributes:
        entry: [N] int32, the core slice of each node; ``None`` between the first level and the rows, and of
            rows whose shares are stored on their way back.
        parent: [N] int32, its node of the level before; ``None`` of the first level's.
        child: [N + 1 and more] int32, its first child in the next level; ``None`` of rows, which have none.
        cuts: [S + 1] first node of each part.
        groups: by slice; ``None`` of the first level, whose nodes are slices.
    """

    entry: Tensor | None
    parent: Tensor | None
    child: Tensor | None
    cuts: Tensor
    groups: Groups | None


@dataclass(frozen=True, eq=False)
class TrainTables:
    """What never changes about the tables of a family, on the device.

    Attributes:
        keys: [tables + 1] first key of each, from 0.
        radices: [tables, d] p_k.
        entry_base: [tables, d] first slice of each core among those of all tables.
        entry_table: per core, [G_k] the table of each slice.
        entry_row: per core, [G_k] its row in the core.
        slices: [d] G_k.
        prefixes: [d - 1] of each length, how many there are in all tables.
        num_prefixes: the same, as the host knows it.
        prefix_columns: Q before each core.
    """

    keys: Tensor
    radices: Tensor
    entry_base: Tensor
    entry_table: Sequence[Tensor]
    entry_row: Sequence[Tensor]
    slices: Tensor
    prefixes: Tensor
    num_prefixes: Sequence[int]
    prefix_columns: Sequence[int]


def tree_parts(family: Family[Any], count: int, tables: TrainTables) -> int:
    """How many parts the nodes above the rows of a batch of ``count`` ids are computed in.

    One where all the prefixes that there are take no more room than those of a micro-batch of rows may;
    else as many as there are micro-batches, which then have nodes of their own.
    """
    micro = slice_rows(count, family.micro_batch_rows)
    return 1 if tables.num_prefixes[-1] <= micro else cdiv(count, micro)


def make_levels(family: Family[Any], call: Call, tables: TrainTables) -> list[Level]:
    """Levels 1 .. d of a batch with ids."""
    plan, count = call.plan, call.batch.ids.numel()
    order, micro, device = len(tables.entry_row), slice_rows(count, family.micro_batch_rows), family.device
    blocks, slices = cdiv(count + 1, count_constants(order)["BL"]), cdiv(count, micro)
    trees = tree_parts(family, count, tables)
    part_rows = micro if trees > 1 else count
    parts = [trees] * (order - 1) + [slices]
    digits, last, new = _digits(family, call, tables, part_rows)
    counts = torch.empty(blocks, order - 1, dtype=torch.int32, device=device)
    count_nodes[(blocks,)](counts, new, count, **count_constants(order))
    # A part that begins within a prefix makes one node more of it.
    sizes = [aligned(min(count, prefixes + trees - 1)) for prefixes in tables.num_prefixes] + [count]
    of_child = [size + ALIGNED for size in sizes[:-1]]
    entry, parent, child = (
        torch.empty(numel, dtype=torch.int32, device=device)
        for numel in (sizes[0], sum(sizes[1:]), sum(of_child))
    )
    most = slices * max(core.numel() for core in tables.entry_row)
    # 32-bit keys sort in half the time.
    group_key = torch.empty_like(parent, dtype=torch.int32 if most < 2**31 else torch.int64)
    node_cuts = torch.empty(order, slices + 1, dtype=torch.int64, device=device)
    place_nodes[(blocks,)](
        entry,
        parent,
        child,
        node_cuts,
        group_key,
        counts,
        digits,
        last,
        new,
        plan.cuts[family.index :],
        tables.slices,
        tables.prefixes,
        count,
        blocks,
        trees,
        part_rows,
        slices,
        micro,
        **node_constants(order),
    )
    # Given back before the sorts take theirs.
    del digits, new
    of_rows = None if family.shapes[0].stores_shares else last
    del last
    parents, keys = torch.split(parent, sizes[1:]), torch.split(group_key, sizes[1:])
    children = torch.split(child, of_child)
    return [
        Level(
            entry=entry if k == 0 else of_rows if k == order - 1 else None,
            parent=parents[k - 1] if k else None,
            child=children[k] if k < order - 1 else None,
            cuts=node_cuts[k, : parts[k] + 1],
            groups=_group(keys[k - 1], parts[k], tables, k) if k else None,
        )
        for k in range(order)
    ]


def _digits(
    family: Family[Any], call: Call, tables: TrainTables, part_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """[d - 1, L] and [L] int32: each row's core slices; [d - 1, L] int8: where a new prefix begins."""
    count, device = call.batch.ids.numel(), family.device
    num_tables, order = tables.radices.shape
    digits = torch.empty(order - 1, count, dtype=torch.int32, device=device)
    last = torch.empty(count, dtype=torch.int32, device=device)
    new = torch.empty(order - 1, count, dtype=torch.int8, device=device)
    constants = digit_constants(order, num_tables)
    split_digits[(cdiv(count, constants["BR"]),)](
        digits,
        last,
        new,
        call.plan.row_key,
        call.plan.cuts[family.index :],
        call.keys.bounds[family.index :],
        tables.keys,
        tables.radices,
        tables.entry_base,
        num_tables,
        count,
        part_rows,
        **constants,
    )
    return digits, last, new


def _group(key: Tensor, parts: int, tables: TrainTables, core: int) -> Groups:
    """Sort a level's nodes by part and slice, which is their key."""
    count, device = key.numel(), key.device
    num_groups, wide = parts * tables.entry_row[core].numel(), tables.prefix_columns[core]
    sorted_key, order = torch.sort(key, stable=True)
    nodes = order.to(torch.int32)
    del order
    first, tiles = (torch.empty(num_groups + 1, dtype=torch.int64, device=device) for _ in range(2))
    constants = group_constants(count)
    group_bounds[(cdiv(num_groups + 1, constants["BG"]),)](
        first, tiles, sorted_key, count, num_groups, wide, **constants
    )
    tile_first = torch.cumsum(tiles, 0)
    most = min(num_groups, count) + cdiv(count * wide, TILE_ROWS)
    tile_group = torch.empty(most, dtype=key.dtype, device=device)
    constants = find_constants(num_groups)
    find_groups[(cdiv(most, constants["BT"]),)](tile_group, tile_first, num_groups, most, **constants)
    return Groups(nodes, first, tile_first, tile_group)
