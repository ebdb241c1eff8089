"""The nodes of every level of a batch's prefix tree, and their groups by core slice, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    TILE_ROWS,
    count_constants,
    digit_constants,
    find_constants,
    group_constants,
    node_constants,
)


@dataclass(frozen=True, eq=False)
class Groups:
    """The nodes of a level by core slice, micro-batch by micro-batch.

    Attributes:
        nodes: [L] nodes, sorted by (micro-batch, slice).
        first: [S G + 1] where each group starts in ``nodes``.
        tile_first: [S G + 1] the same in tiles of ``TILE_ROWS`` rows.
        tile_group: the group of each tile.
    """

    nodes: Tensor
    first: Tensor
    tile_first: Tensor
    tile_group: Tensor


@dataclass(frozen=True, eq=False)
class Level:
    """The nodes of one level, numbered in the order of their rows.

    Attributes:
        entry: [L] the core slice of each node.
        parent: [L] its node of the level before; means nothing of the first level's.
        child: [L + 1] its first child in the next level; ``None`` of rows, which have none.
        cuts: [S + 1] first node of each micro-batch.
        groups: by slice; ``None`` of the first level, whose nodes are slices.
    """

    entry: Tensor
    parent: Tensor
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
        prefix_columns: Q before each core.
    """

    keys: Tensor
    radices: Tensor
    entry_base: Tensor
    entry_table: Sequence[Tensor]
    entry_row: Sequence[Tensor]
    slices: Tensor
    prefix_columns: Sequence[int]


def make_levels(family: Family[Any], call: Call, tables: TrainTables) -> list[Level]:
    """Levels 1 .. d of a batch with ids."""
    plan, count = call.plan, call.batch.ids.numel()
    num_tables, order = tables.radices.shape
    micro, device = family.micro_batch_rows, family.device
    digits = torch.empty(order, count, dtype=torch.int64, device=device)
    new = torch.empty(order - 1, count, dtype=torch.int8, device=device)
    cuts = plan.cuts[family.index :]
    constants = digit_constants(order, num_tables)
    split_digits[(cdiv(count, constants["BR"]),)](
        digits,
        new,
        plan.row_key,
        cuts,
        call.keys.bounds[family.index :],
        tables.keys,
        tables.radices,
        tables.entry_base,
        num_tables,
        count,
        micro,
        **constants,
    )
    constants = node_constants(order)
    blocks, slices = cdiv(count + 1, constants["BL"]), cdiv(count, micro)
    counts = torch.empty(blocks, order - 1, dtype=torch.int32, device=device)
    count_nodes[(blocks,)](counts, new, count, **count_constants(order))
    entry, parent = torch.empty(2, order, count, dtype=torch.int64, device=device)
    child = torch.empty(order - 1, count + 1, dtype=torch.int64, device=device)
    node_cuts = torch.empty(order, slices + 1, dtype=torch.int64, device=device)
    most = slices * max(core.numel() for core in tables.entry_row)
    # 32-bit keys sort in half the time.
    kind = torch.int32 if most < 2**31 else torch.int64
    group_key = torch.empty(order - 1, count, dtype=kind, device=device)
    place_nodes[(blocks,)](
        entry,
        parent,
        child,
        node_cuts,
        group_key,
        counts,
        digits,
        new,
        cuts,
        tables.slices,
        count,
        blocks,
        slices,
        micro,
        **constants,
    )
    return [
        Level(
            entry=entry[k],
            parent=parent[k],
            child=child[k] if k < order - 1 else None,
            cuts=node_cuts[k],
            groups=_group(group_key[k - 1], slices, tables, k) if k else None,
        )
        for k in range(order)
    ]


def _group(key: Tensor, micro_batches: int, tables: TrainTables, core: int) -> Groups:
    """Sort a level's nodes by micro-batch and slice, which is their key."""
    count, device = key.numel(), key.device
    num_groups, wide = micro_batches * tables.entry_row[core].numel(), tables.prefix_columns[core]
    sorted_key, nodes = torch.sort(key, stable=True)
    first, tiles = torch.empty(2, num_groups + 1, dtype=torch.int64, device=device)
    constants = group_constants(count)
    group_bounds[(cdiv(num_groups + 1, constants["BG"]),)](
        first, tiles, sorted_key, count, num_groups, wide, **constants
    )
    tile_first = torch.cumsum(tiles, 0)
    most = min(num_groups, count) + cdiv(count * wide, TILE_ROWS)
    tile_group = torch.empty(most, dtype=torch.int64, device=device)
    constants = find_constants(num_groups)
    find_groups[(cdiv(most, constants["BT"]),)](tile_group, tile_first, num_groups, most, **constants)
    return Groups(nodes, first, tile_first, tile_group)
