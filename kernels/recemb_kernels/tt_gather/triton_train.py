"""Tensor-train tables on the device: the launches of :mod:`tt_gather.triton_kernel`, level by level."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from recemb_kernels.triton_frame.elements import ELEMENTS, cdiv
from recemb_kernels.triton_frame.family import Backward, Call, Family
from recemb_kernels.triton_frame.gradients import Places, sum_segments
from recemb_kernels.triton_frame.launches import PIECE
from recemb_kernels.triton_frame.pooling import pool, weigh
from recemb_kernels.triton_frame.steps import Entries, step
from recemb_kernels.tt_gather import TrainShape
from recemb_kernels.tt_gather.triton_children import join_children, sum_children
from recemb_kernels.tt_gather.triton_kernel import add_slices, copy_slices, mark_touched
from recemb_kernels.tt_gather.triton_levels import Level, TrainTables, make_levels
from recemb_kernels.tt_gather.triton_variants import (
    MOST_PROGRAMS,
    TILE_ROWS,
    children_constants,
    gradient_constants,
    join_constants,
    multiply_constants,
    multiply_tuned,
    slice_block,
    slice_gradient_tuned,
    touched_constants,
)


@dataclass(eq=False)
class _Kept:
    """The tree of a batch, and the products of its nodes while one micro-batch holds them all."""

    levels: list[Level]
    rows: Tensor | None = None
    products: list[Tensor] | None = None


@dataclass(frozen=True, eq=False)
class _Part:
    """A micro-batch of rows, and the part of the tree above them.

    Attributes:
        levels: of the whole batch.
        parameters: of the family.
        count: L, ids of the whole batch.
        number: of the part, from 0.
        micro_batch: from 0; a part has one, but for a tree of one part, which has all.
    """

    levels: Sequence[Level]
    parameters: Sequence[Tensor]
    count: int
    number: int
    micro_batch: int

    @property
    def last(self) -> int:
        """The level of the rows."""
        return len(self.levels) - 1

    @property
    def whole(self) -> bool:
        """Whether its tree has one part."""
        return self.levels[0].cuts.numel() == 2

    def at(self, k: int) -> int:
        """Its number among the parts of level k."""
        return self.micro_batch if k == self.last else self.number

    def cuts(self, k: int) -> Tensor:
        """Its first node of level k, then the one after its last."""
        return self.levels[k].cuts[self.at(k) :]


class TrainFamily(Family[TrainShape]):
    """Tensor-train tables with the same (q_1 .. q_d) and ranks."""

    plans_forward = True

    @staticmethod
    def constants(shape: TrainShape) -> Hashable:
        return shape.dim_shape, shape.ranks

    @staticmethod
    def num_keys(shape: TrainShape) -> int:
        return math.prod(shape.row_shape)

    @staticmethod
    def num_parameters(shape: TrainShape) -> int:
        return len(shape.row_shape)

    def prepare(self, call: Call) -> None:
        call.kept[self.index] = _Kept(make_levels(self, call, self._tables))

    def forward(self, call: Call, parameters: Sequence[Tensor], out: Tensor, keep: bool) -> None:
        count = call.batch.ids.numel()
        kept: _Kept | None = call.kept.get(self.index)
        levels = kept.levels if kept else make_levels(self, call, self._tables)
        rows = torch.empty(count, self._dim, dtype=torch.float32, device=self.device)
        products: list[Tensor] = []
        for parts in self._parts(levels, parameters, count):
            products.clear()  # before the next ones are made
            products += self._products(parts[0])
            for part in parts:
                self._multiply(part, part.last, products[-1], rows)
        pool(self, call, out, rows, call.plan.inverse, self._row_cuts(call), self._dim)
        if keep:
            weighted = call.batch.weights is not None
            # All families keep theirs: the workspace would grow with them if larger batches did, too.
            whole = count <= self.micro_batch_rows
            call.kept[self.index] = _Kept(levels, rows if weighted else None, products if whole else None)

    def backward(self, call: Call, parameters: Sequence[Tensor], asked: Backward) -> list[Tensor | None]:
        kept: _Kept = call.kept[self.index]
        if asked.grad_weights is not None:
            assert kept.rows is not None
            weigh(self, call, asked, kept.rows, call.plan.inverse, self._row_cuts(call), self._dim)
        places = Places.of(self, call, asked.grad_out)
        grads = [
            torch.zeros(table.numel(), width, dtype=torch.float32, device=self.device)
            for table, width in zip(self._tables.entry_table, self._widths, strict=True)
        ]
        first_touched = torch.zeros(len(grads[0]), dtype=torch.int32, device=self.device)
        for parts in self._parts(kept.levels, parameters, call.batch.ids.numel()):
            self._back(parts, kept.products, places, grads, first_touched)
        touched = [first_touched]
        for level, grad in zip(kept.levels[1:], grads[1:], strict=True):
            touched.append(self._touched(level, len(grad)))
        return self._finish(parameters, asked, grads, touched)

    def _parts(
        self, levels: Sequence[Level], parameters: Sequence[Tensor], count: int
    ) -> Iterator[list[_Part]]:
        """The micro-batches of each part of the tree."""
        micro_batches, parts = range(cdiv(count, self.micro_batch_rows)), levels[0].cuts.numel() - 1
        for number in range(parts):
            own = micro_batches if parts == 1 else (number,)
            yield [_Part(levels, parameters, count, number, micro_batch) for micro_batch in own]

    def _touched(self, level: Level, entries: int) -> Tensor:
        """[G] int32: the slices of a level that the batch has."""
        assert level.groups is not None
        touched = torch.empty(entries, dtype=torch.int32, device=self.device)
        constants = touched_constants()
        mark_touched[(cdiv(entries, constants["BE"]),)](
            touched, level.groups.first, entries, level.cuts.numel() - 1, **constants
        )
        return touched

    def _products(self, part: _Part) -> list[Tensor]:
        """The products of its prefixes, level by level; those of its rows are left out."""
        products = [
            torch.empty(self._most_nodes(k, part), columns * rank, dtype=self.dtype, device=self.device)
            for k, (columns, rank) in enumerate(
                zip(self._tables.prefix_columns[1:], self._ranks[1:-1], strict=True)
            )
        ]
        width = products[0].shape[1]
        block = slice_block(width)
        copy_slices[(len(products[0]), cdiv(width, block["BW"]))](
            products[0],
            self._cores(part, 0),
            part.levels[0].entry,
            self._tables.entry_table[0],
            self._tables.entry_row[0],
            part.cuts(0),
            W=width,
            ELEMENT=ELEMENTS[self.dtype],
            **block,
        )
        for k in range(1, part.last):
            self._multiply(part, k, products[k - 1], products[k])
        return products

    def _most_nodes(self, k: int, part: _Part) -> int:
        """How many nodes of level k a part has at most."""
        rows = part.count if part.whole and k < part.last else min(part.count, self.micro_batch_rows)
        return rows if k == part.last else min(rows, self._tables.num_prefixes[k])

    def _multiply(self, part: _Part, k: int, source: Tensor, out: Tensor, *, forward: bool = True) -> None:
        """Multiply the nodes of level k by their slices of core k, or on the way back by their transposes."""
        level, tables = part.levels[k], self._tables
        groups, entries = level.groups, tables.entry_table[k].numel()
        assert groups is not None
        constants = multiply_constants(self.shapes[0], k, self.dtype, forward)
        nodes, own = self._most_nodes(k, part), part.cuts(k)
        tiles = min(entries, nodes) + cdiv(nodes * constants["Q"], TILE_ROWS)
        multiply_tuned[(tiles, cdiv(constants["N"], constants["BN"]))](
            out,
            source,
            self._cores(part, k),
            groups.nodes,
            level.parent,
            groups.first,
            groups.tile_first,
            groups.tile_group,
            tables.entry_table[k],
            tables.entry_row[k],
            part.cuts(k - 1) if forward else own,
            # Rows are counted from the first of the batch, nodes from the first of the part.
            self._zero if k == part.last else own,
            entries,
            part.at(k),
            **constants,
        )

    def _back(
        self,
        parts: Sequence[_Part],
        products: Sequence[Tensor] | None,
        places: Places,
        grads: Sequence[Tensor],
        first_touched: Tensor,
    ) -> None:
        """Add the share of a part of the tree to the gradients of the cores' slices."""
        part = parts[0]
        products = products or self._products(part)
        grad_node = self._rows_back(parts, products[-1], places, grads[-1])
        for k in range(part.last - 1, 0, -1):
            self._add_products(part, k, products[k - 1], grad_node, grads[k])
            grad_node = self._nodes_back(part, k, grad_node)
        self._add(part, grad_node, grads[0], first_touched)

    def _add_products(self, part: _Part, k: int, products: Tensor, grad_node: Tensor, grad: Tensor) -> None:
        """Add to the gradients of core k's slices: the products above, times the gradients of their nodes."""
        level, entries = part.levels[k], len(grad)
        assert level.groups is not None
        constants = gradient_constants(self.shapes[0], k, self.dtype)
        slice_gradient_tuned[(entries, *(cdiv(constants[x], constants[f"B{x}"]) for x in ("K", "N")))](
            grad,
            products,
            grad_node,
            level.groups.nodes,
            level.parent,
            level.groups.first,
            part.cuts(k - 1),
            part.cuts(k),
            entries,
            part.at(k),
            **constants,
        )

    def _rows_back(self, parts: Sequence[_Part], products: Tensor, places: Places, grad: Tensor) -> Tensor:
        """The gradients of the rows' parents; ``grad`` gets those of their slices. By micro-batch both."""
        last, rows = parts[0].last, self._most_nodes(parts[0].last, parts[0])
        nodes, width = self._most_nodes(last - 1, parts[0]), join_constants(self.shapes[0])["W"]
        out = torch.empty(nodes, width, dtype=torch.float32, device=self.device)
        for part in parts:
            grad_rows = places.rows(part.cuts(last), self._dim, rows)
            self._add_products(part, last, products, grad_rows, grad)
            self._sum_children(part, out, grad_rows)
            del grad_rows  # before the next ones are made
        return out

    def _sum_children(self, part: _Part, out: Tensor, grad_rows: Tensor) -> None:
        """Add the gradients of a micro-batch's rows, each of which has a slice, to their parents'."""
        tables, level, above = self._tables, part.levels[part.last], part.levels[part.last - 1]
        constants, joining = children_constants(self.shapes[0], self.dtype), join_constants(self.shapes[0])
        pieces, width = cdiv(len(grad_rows), PIECE), joining["W"]
        parts = torch.empty(pieces, width, dtype=torch.float32, device=self.device)
        programs = min(len(out) + pieces, MOST_PROGRAMS)
        sum_children[(programs, cdiv(constants["K"], constants["BK"]))](
            out,
            parts,
            grad_rows,
            self._cores(part, part.last),
            above.child,
            level.parent,
            level.entry,
            tables.entry_table[part.last],
            tables.entry_row[part.last],
            part.cuts(part.last),
            part.cuts(part.last - 1),
            **constants,
        )
        join_children[(pieces, cdiv(width, joining["BW"]))](
            out,
            parts,
            above.child,
            level.parent,
            part.cuts(part.last),
            part.cuts(part.last - 1),
            **joining,
        )

    def _nodes_back(self, part: _Part, k: int, grad_node: Tensor) -> Tensor:
        """The gradients of level k - 1 from those of level k, which share slices: products, then sums."""
        child = part.levels[k - 1].child
        assert child is not None
        constants = multiply_constants(self.shapes[0], k, self.dtype, False)
        nodes, width = self._most_nodes(k - 1, part), constants["Q"] * constants["N"]
        shares = torch.empty(self._most_nodes(k, part), width, dtype=torch.float32, device=self.device)
        self._multiply(part, k, grad_node, shares, forward=False)
        out = torch.empty(nodes, width, dtype=torch.float32, device=self.device)
        sum_segments(out, shares, child, part.cuts(k - 1), nodes, relative=True)
        return out

    def _add(self, part: _Part, grad_node: Tensor, grad: Tensor, touched: Tensor) -> None:
        width = grad.shape[1]
        block = slice_block(width)
        add_slices[(len(grad_node), cdiv(width, block["BW"]))](
            grad,
            touched,
            grad_node,
            part.levels[0].entry,
            part.cuts(0),
            W=width,
            **block,
        )

    def _finish(
        self,
        parameters: Sequence[Tensor],
        asked: Backward,
        grads: Sequence[Tensor],
        touched: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """Step on the cores of tables with an update; cut the gradients of the others out."""
        order = len(grads)
        if any(update is not None for update in asked.updates):
            for k, grad in enumerate(grads):
                entries = Entries(
                    self._tables.entry_table[k],
                    self._tables.entry_row[k],
                    touched[k],
                    self.remembered((0, len(grad))),
                    len(grad),
                )
                step(self, entries, grad, parameters[k::order], asked, k)
        found: list[Tensor | None] = []
        for t in range(len(asked.updates)):
            for k, grad in enumerate(grads):
                first = self._entry_base[t][k]
                own = grad[first : first + self.shapes[t].row_shape[k]]
                found.append(own.to(self.dtype) if asked.writes(t, k, order) else None)
        return found

    def _cores(self, part: _Part, k: int) -> Tensor:
        return self.addresses(part.parameters[k :: len(self._dims)])

    def _row_cuts(self, call: Call) -> Tensor:
        return call.plan.cuts[self.index :]

    @cached_property
    def _zero(self) -> Tensor:
        return self.constant([0])

    @property
    def _dims(self) -> tuple[int, ...]:
        return self.shapes[0].dim_shape

    @property
    def _ranks(self) -> tuple[int, ...]:
        return self.shapes[0].ranks

    @property
    def _dim(self) -> int:
        return self.shapes[0].dim

    @property
    def _widths(self) -> list[int]:
        """Elements of a slice, per core."""
        return [r * q * s for r, q, s in zip(self._ranks, self._dims, self._ranks[1:], strict=False)]

    @cached_property
    def _entry_base(self) -> list[list[int]]:
        """Per table and core, its first slice among those of all tables."""
        rows = [shape.row_shape for shape in self.shapes]
        return [[sum(other[k] for other in rows[:t]) for k in range(len(p))] for t, p in enumerate(rows)]

    @cached_property
    def _tables(self) -> TrainTables:
        keys = [0]
        for shape in self.shapes:
            keys.append(keys[-1] + self.num_keys(shape))
        cores = range(len(self._dims))
        prefixes = [sum(math.prod(s.row_shape[: k + 1]) for s in self.shapes) for k in cores[:-1]]
        each = [[(t, row) for t, s in enumerate(self.shapes) for row in range(s.row_shape[k])] for k in cores]
        return TrainTables(
            keys=self.constant(keys),
            radices=self.constant([shape.row_shape for shape in self.shapes]),
            entry_base=self.constant(self._entry_base),
            entry_table=[self.constant([t for t, _ in own]) for own in each],
            entry_row=[self.constant([row for _, row in own]) for own in each],
            slices=self.constant([len(own) for own in each]),
            prefixes=self.constant(prefixes),
            num_prefixes=prefixes,
            prefix_columns=[math.prod(self._dims[:k]) for k in cores],
        )
