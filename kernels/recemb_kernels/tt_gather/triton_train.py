"""Tensor-train tables on the device: the launches of :mod:`tt_gather.triton_kernel`, level by level."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from recemb_kernels.triton_frame import slice_rows
from recemb_kernels.triton_frame.elements import ELEMENTS, cdiv
from recemb_kernels.triton_frame.family import Backward, Call, Family
from recemb_kernels.triton_frame.gradients import Places, sum_segments
from recemb_kernels.triton_frame.launches import PIECE
from recemb_kernels.triton_frame.pooling import Rows, weigh
from recemb_kernels.triton_frame.steps import Entries, step
from recemb_kernels.tt_gather import TrainShape
from recemb_kernels.tt_gather.triton_children import join_children, sum_children
from recemb_kernels.tt_gather.triton_kernel import add_slices, copy_slices, mark_touched
from recemb_kernels.tt_gather.triton_levels import Level, TrainTables, make_levels
from recemb_kernels.tt_gather.triton_parts import Part, RowsInTurns
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
        weighs = keep and call.batch.weights is not None
        turns = RowsInTurns(self, call, self._feature_keys, weighs)
        first, products = self._first_products(levels, parameters), list[Tensor]()
        for parts in self._parts(levels, parameters, count):
            products.clear()  # before the next ones are made
            products += self._products(parts[0], first)
            for part in parts:
                self._multiply(part, part.last, products[-1], turns.rows, turns.base(part))
                turns.take(part, out)
        if keep:
            # All families keep theirs: the workspace would grow with them if larger batches did, too.
            whole = count <= slice_rows(count, self.micro_batch_rows)
            call.kept[self.index] = _Kept(levels, turns.rows if weighs else None, products if whole else None)

    def backward(self, call: Call, parameters: Sequence[Tensor], asked: Backward) -> list[Tensor | None]:
        kept: _Kept = call.kept[self.index]
        if asked.grad_weights is not None:
            assert kept.rows is not None
            limits = call.plan.cuts[self.index :]
            weigh(self, call, asked, Rows(kept.rows, call.plan.inverse, limits, self._dim))
        places = Places.of(self, call, asked.grad_out)
        grads = [
            torch.zeros(table.numel(), width, dtype=torch.float32, device=self.device)
            for table, width in zip(self._tables.entry_table, self._widths, strict=True)
        ]
        levels, products = kept.levels, kept.products or [self._first_products(kept.levels, parameters)]
        grad_first = torch.empty(products[0].shape, dtype=torch.float32, device=self.device)
        for parts in self._parts(levels, parameters, call.batch.ids.numel()):
            self._back(parts, products, places, [grad_first, *grads[1:]])
        touched = [self._add_first(levels[0], grad_first, grads[0])]
        for level, grad in zip(kept.levels[1:], grads[1:], strict=True):
            touched.append(self._touched(level, len(grad)))
        return self._finish(parameters, asked, grads, touched)

    def _parts(
        self, levels: Sequence[Level], parameters: Sequence[Tensor], count: int
    ) -> Iterator[list[Part]]:
        """The micro-batches of each part of the tree."""
        rows, parts = slice_rows(count, self.micro_batch_rows), levels[0].cuts.numel() - 1
        for number in range(parts):
            own = range(cdiv(count, rows)) if parts == 1 else (number,)
            yield [Part(levels, parameters, count, rows, number, micro_batch) for micro_batch in own]

    def _touched(self, level: Level, entries: int) -> Tensor:
        """[G] int32: the slices of a level that the batch has."""
        assert level.groups is not None
        touched = torch.empty(entries, dtype=torch.int32, device=self.device)
        constants = touched_constants()
        mark_touched[(cdiv(entries, constants["BE"]),)](
            touched, level.groups.first, entries, level.cuts.numel() - 1, **constants
        )
        return touched

    def _first_products(self, levels: Sequence[Level], parameters: Sequence[Tensor]) -> Tensor:
        """[nodes, q_1 R_1]: the slices of the first level's nodes, those of all parts."""
        first, width = levels[0], self._widths[0]
        assert first.entry is not None
        block = slice_block(width)
        out = torch.empty(first.entry.numel(), width, dtype=self.dtype, device=self.device)
        copy_slices[(len(out), cdiv(width, block["BW"]))](
            out,
            self.addresses(parameters[:: len(self._dims)]),
            first.entry,
            self._tables.entry_table[0],
            self._tables.entry_row[0],
            first.cuts,
            first.cuts.numel() - 1,
            W=width,
            ELEMENT=ELEMENTS[self.dtype],
            **block,
        )
        return out

    def _products(self, part: Part, first: Tensor) -> list[Tensor]:
        """The products of its prefixes, level by level; those of its rows are left out."""
        products = [first]
        for k in range(1, part.last):
            width = self._tables.prefix_columns[k + 1] * self._ranks[k + 1]
            own = torch.empty(self._most_nodes(k, part), width, dtype=self.dtype, device=self.device)
            self._multiply(part, k, products[-1], own, part.base(k))
            products.append(own)
        return products

    def _most_nodes(self, k: int, part: Part) -> int:
        """How many nodes of level k a part has at most."""
        rows = part.count if part.whole and k < part.last else min(part.count, part.rows)
        return rows if k == part.last else min(rows, self._tables.num_prefixes[k])

    def _multiply(
        self, part: Part, k: int, source: Tensor, out: Tensor, base: Tensor, *, forward: bool = True
    ) -> None:
        """Multiply the nodes of level k by their slices of core k, or on the way back by their transposes.

        ``out`` begins with node ``base[0]``.
        """
        level, tables = part.levels[k], self._tables
        groups, entries = level.groups, tables.entry_table[k].numel()
        assert groups is not None
        constants = multiply_constants(self.shapes[0], k, self.dtype, forward)
        nodes = self._most_nodes(k, part)
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
            part.base(k - 1 if forward else k),
            base,
            entries,
            part.at(k),
            **constants,
        )

    def _back(
        self,
        parts: Sequence[Part],
        products: Sequence[Tensor],
        places: Places,
        grads: Sequence[Tensor],
    ) -> None:
        """Add the share of a part of the tree to the gradients of the cores' slices; of the first core, give
        those of its nodes.

        Args:
            products: those of the first level, or of all.
        """
        part = parts[0]
        own = list(products) if len(products) == part.last else self._products(part, products[0])
        grad_node = self._rows_back(parts, own, places, grads)
        for k in range(part.last - 1, 0, -1):
            self._add_products(part, k, own[k - 1], grad_node, grads[k])
            above = self._node_gradients(part, k - 1, grads[0])
            self._nodes_back(part, k, grad_node, above)
            grad_node = above

    def _node_gradients(self, part: Part, k: int, first: Tensor) -> Tensor:
        """Memory for the gradients of the products of level k; ``first`` has the first level's."""
        width = self._tables.prefix_columns[k + 1] * self._ranks[k + 1]
        if k == 0:
            return first
        return torch.empty(self._most_nodes(k, part), width, dtype=torch.float32, device=self.device)

    def _add_products(self, part: Part, k: int, products: Tensor, grad_node: Tensor, grad: Tensor) -> None:
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
            part.base(k - 1),
            part.cuts(k),
            entries,
            part.at(k),
            **constants,
        )

    def _rows_back(
        self, parts: Sequence[Part], products: list[Tensor], places: Places, grads: Sequence[Tensor]
    ) -> Tensor:
        """The gradients of the rows' parents; the last of ``grads`` gets their slices'. By micro-batch both.

        The parents' products are the last of ``products``, taken out once they have been used: shares take
        their room where nobody else keeps them, and the parents' gradients that of the rows' own.
        """
        last, width = parts[0].last, join_constants(self.shapes[0])["W"]
        rows, out = self._most_nodes(last, parts[0]), None
        for part in parts:
            source = places.rows(part.cuts(last), self._dim, rows)
            self._add_products(part, last, products[-1], source, grads[-1])
            if part is parts[-1]:
                products.pop()
            if self.shapes[0].stores_shares:
                shares = torch.empty(rows, width, dtype=torch.float32, device=self.device)
                self._multiply(part, last, source, shares, part.cuts(last), forward=False)
                source = shares
                del shares
            out = self._node_gradients(part, last - 1, grads[0]) if out is None else out
            self._sum_children(part, out, source)
            del source  # before the next ones are made
        assert out is not None  # a batch with ids has a part
        return out

    def _sum_children(self, part: Part, out: Tensor, source: Tensor) -> None:
        """Add the shares of a micro-batch's rows to the gradients of their parents.

        ``source`` [rows, ...] has the shares, or the rows' own gradients.
        """
        tables, level, above = self._tables, part.levels[part.last], part.levels[part.last - 1]
        constants, joining = children_constants(self.shapes[0], self.dtype), join_constants(self.shapes[0])
        pieces, width = cdiv(len(source), PIECE), joining["W"]
        parts = torch.empty(pieces, width, dtype=torch.float32, device=self.device)
        programs = min(self._most_nodes(part.last - 1, part) + pieces, MOST_PROGRAMS)
        sum_children[(programs, cdiv(constants["K"], constants["BK"]))](
            out,
            parts,
            source,
            self._cores(part, part.last),
            above.child,
            level.parent,
            level.parent if level.entry is None else level.entry,
            tables.entry_table[part.last],
            tables.entry_row[part.last],
            part.cuts(part.last),
            part.base(part.last - 1),
            **constants,
        )
        join_children[(pieces, cdiv(width, joining["BW"]))](
            out,
            parts,
            above.child,
            level.parent,
            part.cuts(part.last),
            part.base(part.last - 1),
            **joining,
        )

    def _nodes_back(self, part: Part, k: int, grad_node: Tensor, out: Tensor) -> None:
        """The gradients of level k - 1 from those of level k, which share slices: products, then sums."""
        child = part.levels[k - 1].child
        assert child is not None
        shares = torch.empty(self._most_nodes(k, part), out.shape[1], dtype=torch.float32, device=self.device)
        self._multiply(part, k, grad_node, shares, part.cuts(k), forward=False)
        nodes = self._most_nodes(k - 1, part)
        sum_segments(out, shares, child, part.cuts(k - 1), nodes, part.base(k - 1))

    def _add_first(self, level: Level, source: Tensor, grad: Tensor) -> Tensor:
        """Add the nodes of the first level up by slice; [G] int32, which of these the batch has."""
        width = grad.shape[1]
        block = slice_block(width)
        touched = torch.zeros(len(grad), dtype=torch.int32, device=self.device)
        add_slices[(len(source), cdiv(width, block["BW"]))](
            grad,
            touched,
            source,
            level.entry,
            level.cuts,
            level.cuts.numel() - 1,
            W=width,
            **block,
        )
        return touched

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

    def _cores(self, part: Part, k: int) -> Tensor:
        return self.addresses(part.parameters[k :: len(self._dims)])

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
    def _feature_keys(self) -> Tensor:
        """[F, 2] of each feature's table the first key, and the one after its last."""
        keys = [0, *accumulate(self.num_keys(shape) for shape in self.shapes)]
        return self.constant([[keys[f.table], keys[f.table + 1]] for f in self.own_features])

    @cached_property
    def _entry_base(self) -> list[list[int]]:
        """Per table and core, its first slice among those of all tables."""
        rows = [shape.row_shape for shape in self.shapes]
        return [[sum(other[k] for other in rows[:t]) for k in range(len(p))] for t, p in enumerate(rows)]

    @cached_property
    def _tables(self) -> TrainTables:
        keys = [0, *accumulate(self.num_keys(shape) for shape in self.shapes)]
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
