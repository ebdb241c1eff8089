"""Tensor-train tables on the device: the launches of :mod:`tt_gather.triton_kernel`, level by level."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from recemb_kernels.triton_frame.elements import ELEMENTS, cdiv
from recemb_kernels.triton_frame.family import Backward, Call, Family
from recemb_kernels.triton_frame.gradients import row_gradients, sum_segments
from recemb_kernels.triton_frame.pooling import pool, weigh
from recemb_kernels.triton_frame.steps import Entries, step
from recemb_kernels.tt_gather import TrainShape
from recemb_kernels.tt_gather.triton_kernel import add_slices, copy_slices, mark_touched
from recemb_kernels.tt_gather.triton_levels import Level, TrainTables, make_levels
from recemb_kernels.tt_gather.triton_variants import (
    TILE_ROWS,
    gradient_constants,
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
        slices = cdiv(count, self.micro_batch_rows)
        for micro_batch in range(slices):
            products = self._products(levels, parameters, micro_batch)
            self._multiply(levels, parameters, micro_batch, len(levels) - 1, products[-1], rows)
        pool(self, call, out, rows, call.plan.inverse, self._row_cuts(call), self._dim)
        if keep:
            weighted = call.batch.weights is not None
            call.kept[self.index] = _Kept(
                levels, rows if weighted else None, products if slices == 1 else None
            )

    def backward(self, call: Call, parameters: Sequence[Tensor], asked: Backward) -> list[Tensor | None]:
        kept: _Kept = call.kept[self.index]
        if asked.grad_weights is not None:
            assert kept.rows is not None
            weigh(self, call, asked, kept.rows, call.plan.inverse, self._row_cuts(call), self._dim)
        grad_rows = row_gradients(self, call, asked.grad_out, self._dim)
        grads = [
            torch.zeros(table.numel(), width, dtype=torch.float32, device=self.device)
            for table, width in zip(self._tables.entry_table, self._widths, strict=True)
        ]
        first_touched = torch.zeros(len(grads[0]), dtype=torch.int32, device=self.device)
        for micro_batch in range(cdiv(call.batch.ids.numel(), self.micro_batch_rows)):
            products = kept.products or self._products(kept.levels, parameters, micro_batch)
            grad_node = self._back(kept.levels, parameters, micro_batch, products, grad_rows, grads)
            self._add(kept.levels[0], micro_batch, grad_node, grads[0], first_touched)
        touched = [first_touched]
        for level, grad in zip(kept.levels[1:], grads[1:], strict=True):
            touched.append(self._touched(level, len(grad)))
        return self._finish(parameters, asked, grads, touched)

    def _touched(self, level: Level, entries: int) -> Tensor:
        """[G] int32: the slices of a level that the batch has."""
        assert level.groups is not None
        touched = torch.empty(entries, dtype=torch.int32, device=self.device)
        constants = touched_constants()
        mark_touched[(cdiv(entries, constants["BE"]),)](
            touched, level.groups.first, entries, level.cuts.numel() - 1, **constants
        )
        return touched

    def _products(
        self, levels: Sequence[Level], parameters: Sequence[Tensor], micro_batch: int
    ) -> list[Tensor]:
        """The products of a micro-batch's prefixes, level by level; those of its rows are left out."""
        capacity = min(levels[0].entry.numel(), self.micro_batch_rows)
        products = [
            torch.empty(self._most_nodes(k, capacity), columns * rank, dtype=self.dtype, device=self.device)
            for k, (columns, rank) in enumerate(
                zip(self._tables.prefix_columns[1:], self._ranks[1:-1], strict=True)
            )
        ]
        width = products[0].shape[1]
        block = slice_block(width)
        copy_slices[(len(products[0]), cdiv(width, block["BW"]))](
            products[0],
            self._cores(parameters, 0),
            levels[0].entry,
            self._tables.entry_table[0],
            self._tables.entry_row[0],
            levels[0].cuts[micro_batch:],
            W=width,
            ELEMENT=ELEMENTS[self.dtype],
            **block,
        )
        for k in range(1, len(levels) - 1):
            self._multiply(levels, parameters, micro_batch, k, products[k - 1], products[k])
        return products

    def _most_nodes(self, k: int, capacity: int) -> int:
        """How many nodes level k has at most, of a micro-batch with ``capacity`` rows."""
        prefixes = [math.prod(shape.row_shape[: k + 1]) for shape in self.shapes]
        return min(capacity, sum(prefixes))

    def _multiply(
        self,
        levels: Sequence[Level],
        parameters: Sequence[Tensor],
        micro_batch: int,
        k: int,
        source: Tensor,
        out: Tensor,
        *,
        forward: bool = True,
    ) -> None:
        """Multiply the nodes of level k by their slices of core k, or on the way back by their transposes."""
        level, tables = levels[k], self._tables
        groups, entries = level.groups, tables.entry_table[k].numel()
        assert groups is not None
        constants = multiply_constants(self.shapes[0], k, self.dtype, forward)
        nodes = self._most_nodes(k, min(level.entry.numel(), self.micro_batch_rows))
        rows, own = self._zero, level.cuts[micro_batch:]
        # Rows are counted from the first of the batch, nodes from the first of the micro-batch.
        last = k == len(levels) - 1
        if forward:
            source_base, out_base = levels[k - 1].cuts[micro_batch:], rows if last else own
        else:
            source_base, out_base = rows if last else own, own
        tiles = min(entries, nodes) + cdiv(nodes * constants["Q"], TILE_ROWS)
        multiply_tuned[(tiles, cdiv(constants["N"], constants["BN"]))](
            out,
            source,
            self._cores(parameters, k),
            groups.nodes,
            level.parent,
            groups.first,
            groups.tile_first,
            groups.tile_group,
            tables.entry_table[k],
            tables.entry_row[k],
            source_base,
            out_base,
            entries,
            micro_batch,
            **constants,
        )

    def _back(
        self,
        levels: Sequence[Level],
        parameters: Sequence[Tensor],
        micro_batch: int,
        products: Sequence[Tensor],
        grad_rows: Tensor,
        grads: Sequence[Tensor],
    ) -> Tensor:
        """From the rows' gradients to those of the slices of cores 2 .. d, and of the first level's nodes."""
        tables, last = self._tables, len(levels) - 1
        capacity = min(levels[0].entry.numel(), self.micro_batch_rows)
        grad_node = grad_rows
        for k in range(last, 0, -1):
            level, groups = levels[k], levels[k].groups
            assert groups is not None
            constants, entries = (
                gradient_constants(self.shapes[0], k, self.dtype),
                tables.entry_table[k].numel(),
            )
            grid = (entries, *(cdiv(constants[x], constants[f"B{x}"]) for x in ("K", "N")))
            own, before = level.cuts[micro_batch:], levels[k - 1].cuts[micro_batch:]
            slice_gradient_tuned[grid](
                grads[k],
                products[k - 1],
                grad_node,
                groups.nodes,
                level.parent,
                groups.first,
                before,
                self._zero if k == last else own,
                entries,
                micro_batch,
                **constants,
            )
            width, nodes = constants["Q"] * constants["K"], self._most_nodes(k - 1, capacity)
            shares = torch.empty(
                self._most_nodes(k, capacity), width, dtype=torch.float32, device=self.device
            )
            self._multiply(levels, parameters, micro_batch, k, grad_node, shares, forward=False)
            grad_node = torch.empty(nodes, width, dtype=torch.float32, device=self.device)
            child = levels[k - 1].child
            assert child is not None
            sum_segments(grad_node, shares, child, before, own, nodes)
        return grad_node

    def _add(self, level: Level, micro_batch: int, grad_node: Tensor, grad: Tensor, touched: Tensor) -> None:
        width = grad.shape[1]
        block = slice_block(width)
        add_slices[(len(grad_node), cdiv(width, block["BW"]))](
            grad,
            touched,
            grad_node,
            level.entry,
            level.cuts[micro_batch:],
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

    def _cores(self, parameters: Sequence[Tensor], k: int) -> Tensor:
        return self.addresses(parameters[k :: len(self._dims)])

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
        each = [[(t, row) for t, s in enumerate(self.shapes) for row in range(s.row_shape[k])] for k in cores]
        return TrainTables(
            keys=self.constant(keys),
            radices=self.constant([shape.row_shape for shape in self.shapes]),
            entry_base=self.constant(self._entry_base),
            entry_table=[self.constant([t for t, _ in own]) for own in each],
            entry_row=[self.constant([row for _, row in own]) for own in each],
            slices=self.constant([len(own) for own in each]),
            prefix_columns=[math.prod(self._dims[:k]) for k in cores],
        )
