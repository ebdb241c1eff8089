"""Tables of one shared array on the device: the launches of :mod:`robe_gather.triton_kernel`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from recemb_kernels.robe_gather import RobeShape
from recemb_kernels.robe_gather.triton_kernel import (
    join_halves,
    match_rows,
    place_blocks,
    pool_blocks,
    read_rows,
    sum_blocks,
)
from recemb_kernels.robe_gather.triton_variants import (
    join_constants,
    match_constants,
    place_constants,
    pool_constants,
    read_constants,
    sum_constants,
)
from recemb_kernels.triton_frame.elements import cdiv
from recemb_kernels.triton_frame.family import Backward, Call, Family
from recemb_kernels.triton_frame.gradients import row_gradients, sum_segments
from recemb_kernels.triton_frame.launches import PIECE
from recemb_kernels.triton_frame.plan import Runs, runs_of
from recemb_kernels.triton_frame.pooling import Rows, weigh
from recemb_kernels.triton_frame.steps import Entries, finish


@dataclass(frozen=True, eq=False)
class _Blocks:
    """The blocks of the distinct rows of a batch, K = L * BLOCKS.

    Attributes:
        start: [K] over the weights of all arrays; rows of other families start past them.
        negative: [K] int8, whether a block's sign is -1; ``start`` when blocks have none.
    """

    start: Tensor
    negative: Tensor


class BlockFamily(Family[RobeShape]):
    """Arrays with the same dim, block size and use of signs; an array is one table of the group."""

    @staticmethod
    def constants(shape: RobeShape) -> Hashable:
        return shape.dim, shape.block_size, shape.signed

    @staticmethod
    def num_keys(shape: RobeShape) -> int:
        return shape.num_keys

    @classmethod
    def num_ids(cls, shape: RobeShape, key_base: int) -> int:
        ends = (*shape.key_bases[1:], shape.num_keys)
        return next(end for end in ends if key_base < end) - key_base

    @staticmethod
    def num_parameters(shape: RobeShape) -> int:
        return 1

    def forward(self, call: Call, parameters: Sequence[Tensor], out: Tensor, keep: bool) -> None:
        batch = call.batch
        constants = pool_constants(self.shapes[0], self.dtype, batch.weights is not None)
        tiles = cdiv(self._blocks, constants["BK"]) * constants["CHUNKS"]
        pool_blocks[(cdiv(batch.size, constants["BB"]), len(self.own_features), tiles)](
            out,
            self.addresses(parameters),
            self._tables,
            batch.ids,
            batch.offsets if batch.weights is None else batch.weights,
            batch.offsets,
            self.features,
            self._lookups,
            batch.size,
            out.shape[1],
            batch.ids.numel(),
            **constants,
        )

    def backward(self, call: Call, parameters: Sequence[Tensor], asked: Backward) -> list[Tensor | None]:
        cuts = call.plan.cuts[self.index :]
        placed = self._place(call)
        if asked.grad_weights is not None:
            rows = Rows(self._read(call, parameters, placed), call.plan.inverse, cuts, self._dim)
            weigh(self, call, asked, rows)
        grad_rows = row_gradients(self, call, asked.grad_out, self._dim)
        entries, grad = self._gather(placed, grad_rows)
        return finish(self, entries, grad, parameters, asked, 0)

    def _place(self, call: Call) -> _Blocks:
        count = call.batch.ids.numel()
        # Arrays are small: their weights mostly have 32-bit numbers, which sort in half the time.
        kind = torch.int32 if self._weights < 2**31 else torch.int64
        start = torch.empty(count * self._blocks, dtype=kind, device=self.device)
        negative = torch.empty_like(start, dtype=torch.int8) if self._signed else start
        num_tables = len(self._tables)
        constants = place_constants(self.shapes[0], num_tables)
        place_blocks[(cdiv(count, constants["BR"]), cdiv(self._blocks, constants["BK"]))](
            start,
            negative,
            call.plan.row_key,
            call.plan.cuts[self.index :],
            call.keys.bounds[self.index :],
            self._table_keys,
            self._tables,
            num_tables,
            self._weights,
            count,
            **constants,
        )
        return _Blocks(start, negative)

    def _read(self, call: Call, parameters: Sequence[Tensor], placed: _Blocks) -> Tensor:
        """[L, D] float32: the distinct rows."""
        count = call.batch.ids.numel()
        rows = torch.empty(count, self._dim, dtype=torch.float32, device=self.device)
        arrays = len(self.shapes)
        constants = read_constants(self.shapes[0], self.dtype, arrays)
        read_rows[(cdiv(count, constants["BR"]), cdiv(self._dim, constants["BD"]))](
            rows,
            self.addresses(parameters),
            self._array_rows,
            placed.start,
            placed.negative,
            call.plan.cuts[self.index :],
            arrays,
            **constants,
        )
        return rows

    def _gather(self, placed: _Blocks, grad_rows: Tensor) -> tuple[Entries, Tensor]:
        """The touched array rows and their gradients.

        Blocks are sorted by start. Those that start in one array row are summed over two rows, as they reach
        into the next; an array row's gradient is then the first half of its own sum and the second half of
        the sum before it. So each number has one owner, and a fixed order.
        """
        start, order = torch.sort(placed.start, stable=True)
        start_row = torch.div(start, self._block, rounding_mode="floor").long()
        runs = runs_of(start_row, self.remembered((0, self._rows)))
        count = len(start)
        most, width = min(count, self._rows), 2 * self._block
        pieces = min(count, most + cdiv(count, PIECE))
        parts = torch.empty(pieces, width, dtype=torch.float32, device=self.device)
        constants = sum_constants(self.shapes[0])
        sum_blocks[(cdiv(pieces, constants["BP"]), cdiv(width, constants["BD"]))](
            parts,
            grad_rows,
            start,
            order,
            placed.negative,
            runs.piece_first,
            runs.run_piece,
            runs.cuts,
            **constants,
        )
        sums = torch.empty(most, width, dtype=torch.float32, device=self.device)
        sum_segments(sums, parts, runs.run_piece, runs.cuts, most)
        last = order % self._blocks == self._blocks - 1
        length = torch.where(last, self._dim - (self._blocks - 1) * self._block, self._block)
        return self._join(runs, sums, start % self._block + length > self._block)

    def _join(self, runs: Runs, sums: Tensor, reaches: Tensor) -> tuple[Entries, Tensor]:
        """From the sums of the runs to the gradients of the array rows.

        Args:
            sums: [runs, 2 Z].
            reaches: [K], by start: whether each block goes on in the row after the one it starts in.
        """
        most, arrays = len(sums), len(self.shapes)
        spilled = torch.cat((self._zero, torch.cumsum(reaches, 0)))
        table, row, own, before = torch.empty(4, 2 * most, dtype=torch.int64, device=self.device)
        touched = torch.empty(2 * most, dtype=torch.int32, device=self.device)
        constants = match_constants(arrays, most)
        match_rows[(cdiv(most, constants["BR"]),)](
            table,
            row,
            touched,
            own,
            before,
            runs.key,
            runs.first,
            spilled,
            runs.cuts,
            self._array_rows,
            arrays,
            most,
            **constants,
        )
        entries = Entries(table, row, touched, 2 * runs.cuts, 2 * most)
        grad = torch.empty(2 * most, self._block, dtype=torch.float32, device=self.device)
        constants = join_constants(self._block)
        join_halves[(2 * most, cdiv(self._block, constants["BZ"]))](
            grad,
            sums,
            touched,
            own,
            before,
            entries.cuts,
            **constants,
        )
        return entries, grad

    @property
    def _dim(self) -> int:
        return self.shapes[0].dim

    @property
    def _block(self) -> int:
        return self.shapes[0].block_size

    @property
    def _blocks(self) -> int:
        return cdiv(self._dim, self._block)

    @property
    def _signed(self) -> bool:
        return self.shapes[0].signed

    @cached_property
    def _rows(self) -> int:
        return sum(shape.rows for shape in self.shapes)

    @property
    def _weights(self) -> int:
        return self._rows * self._block

    @cached_property
    def _zero(self) -> Tensor:
        return self.constant([0])

    @cached_property
    def _array_rows(self) -> Tensor:
        """[arrays + 1]: first row of each array among those of all."""
        return self.constant([0, *accumulate(shape.rows for shape in self.shapes)])

    @cached_property
    def _first_keys(self) -> list[int]:
        """Of each array."""
        return [0, *accumulate(map(self.num_keys, self.shapes))][:-1]

    @cached_property
    def _table_keys(self) -> Tensor:
        """[V + 1]: first key of every table of every array, and one past the last."""
        bases = [
            first + base
            for first, shape in zip(self._first_keys, self.shapes, strict=True)
            for base in shape.key_bases
        ]
        return self.constant([*bases, self._first_keys[-1] + self.num_keys(self.shapes[-1])])

    @cached_property
    def _tables(self) -> Tensor:
        """[V, 9 + 2 BLOCKS]: what the kernels know of every table of every array."""
        rows, weights, each = [], 0, 2 * self._blocks
        for a, (shape, first) in enumerate(zip(self.shapes, self._first_keys, strict=True)):
            size = shape.rows * shape.block_size
            for t, base in enumerate(shape.key_bases):
                head = [a, first + base, *shape.slot, *shape.sign, size, 2**61 // size, weights]
                rows.append([*head, *shape.offsets[t * each : (t + 1) * each]])
            weights += size
        return self.constant(rows)

    @cached_property
    def _lookups(self) -> Tensor:
        """[F, 3]: table of each feature, what is added to its ids, and how many it has."""
        rows = []
        for feature in self.own_features:
            bases = self.shapes[feature.table].key_bases
            table = max(t for t, base in enumerate(bases) if base <= feature.key_base)
            number = sum(len(shape.key_bases) for shape in self.shapes[: feature.table]) + table
            ids = self.num_ids(self.shapes[feature.table], feature.key_base)
            rows.append([number, feature.key_base - bases[table], ids])
        return self.constant(rows)
