"""The nodes of every level of a batch's prefix tree, and their groups by core slice, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from recemb_kernels.triton_frame.family import Call, Family
from recemb_kernels.triton_frame.plan import numbered, starts
from recemb_kernels.tt_gather.triton_kernel import split_digits
from recemb_kernels.tt_gather.triton_variants import TILE_ROWS


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
        parent: [L] its node of the level before.
        child: [L + 1] its first child in the next level; means nothing of rows, which have none.
        cuts: [S + 1] first node of each micro-batch.
        groups: by slice; ``None`` of the first level, whose nodes are slices.
    """

    entry: Tensor
    parent: Tensor
    child: Tensor
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
        prefix_columns: Q before each core.
    """

    keys: Tensor
    radices: Tensor
    entry_base: Tensor
    entry_table: Sequence[Tensor]
    entry_row: Sequence[Tensor]
    prefix_columns: Sequence[int]


def make_levels(family: Family[Any], call: Call, tables: TrainTables) -> list[Level]:
    """Levels 1 .. d of a batch with ids."""
    plan, count = call.plan, call.batch.ids.numel()
    order, micro = tables.radices.shape[1], family.micro_batch_rows
    device = family.device
    entries = torch.empty(order, count, dtype=torch.int64, device=device)
    new = torch.empty(order - 1, count, dtype=torch.int8, device=device)
    cuts = plan.cuts[family.index :]
    num_tables = tables.radices.shape[0]
    split_digits[(triton.cdiv(count, 256),)](
        entries,
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
        ORDER=order,
        STEPS=num_tables.bit_length(),
        BR=256,
        num_warps=4,
    )
    node = numbered(new)
    slices = triton.cdiv(count, micro)
    row_cuts = (cuts[0] + torch.arange(slices + 1, device=device) * micro).clamp(max=cuts[1])
    first_row = [torch.minimum(starts(of, count), cuts[1]) for of in node]
    levels = []
    for k in range(order - 1):
        row = first_row[k][:-1].clamp(max=count - 1)
        entry, node_cuts = entries[k][row], torch.searchsorted(first_row[k], row_cuts)
        levels.append(
            Level(
                entry=entry,
                parent=node[k - 1][row] if k else entry,
                # Rows are the children of the last prefixes.
                child=first_row[k] if k == order - 2 else torch.searchsorted(first_row[k + 1], first_row[k]),
                cuts=node_cuts,
                groups=_group(entry, node_cuts, tables, k) if k else None,
            )
        )
    groups = _group(entries[-1], row_cuts, tables, order - 1)
    return [*levels, Level(entries[-1], node[-1], row_cuts, row_cuts, groups)]


def _group(entry: Tensor, cuts: Tensor, tables: TrainTables, core: int) -> Groups:
    """Sort a level's nodes by micro-batch and slice."""
    count, device = entry.numel(), entry.device
    slices, entries, wide = cuts.numel() - 1, tables.entry_row[core].numel(), tables.prefix_columns[core]
    node = torch.arange(count, device=device)
    # 0 before the first micro-batch, S + 1 past the last.
    micro_batch = torch.searchsorted(cuts, node, right=True)
    inside = (micro_batch > 0) & (micro_batch <= slices)
    key = torch.where(inside, (micro_batch - 1) * entries + entry, slices * entries)
    sorted_key, nodes = torch.sort(key, stable=True)
    first = starts(sorted_key, slices * entries)
    tiles = (first.diff() * wide + (TILE_ROWS - 1)) // TILE_ROWS
    tile_first = torch.cat((tiles.new_zeros(1), torch.cumsum(tiles, 0)))
    most = min(slices * entries, count) + triton.cdiv(count * wide, TILE_ROWS)
    tile = torch.arange(most, device=device)
    tile_group = torch.searchsorted(tile_first, tile, right=True) - 1
    return Groups(nodes, first, tile_first, tile_group)
