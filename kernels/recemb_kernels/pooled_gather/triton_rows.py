"""Tables of stored rows on the device, and their gradients: rows, pairs of parts, and projected rows."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from recemb_kernels.pooled_gather import Operation, RowShape
from recemb_kernels.pooled_gather.batched import Run, over_samples
from recemb_kernels.pooled_gather.triton_kernel import pair_rows, pool_pairs, split_rows, sum_sides
from recemb_kernels.pooled_gather.triton_variants import (
    pair_constants,
    pool_constants,
    side_constants,
    split_constants,
)
from recemb_kernels.triton_frame.elements import cdiv
from recemb_kernels.triton_frame.family import Backward, Call, Family, FamilyFeature
from recemb_kernels.triton_frame.gradients import row_gradients, sum_segments
from recemb_kernels.triton_frame.launches import PIECE
from recemb_kernels.triton_frame.plan import runs_of
from recemb_kernels.triton_frame.pooling import Rows, pool, weigh
from recemb_kernels.triton_frame.steps import Entries, TableKeys, finish, located

# Runs that cannot be longer are summed by one program each, without the round through memory of pieces.
_WHOLE = 4 * PIECE


@dataclass(frozen=True, eq=False)
class _Split:
    """The distinct rows of a batch, taken apart.

    Attributes:
        part: [L] each, the addresses of the quotients' and of the remainders' parts.
        key: [L] each, their rows, numbered over all tables; those of quotients rise.
    """

    part: tuple[Tensor, Tensor]
    key: tuple[Tensor, Tensor]


class RowFamily(Family[RowShape]):
    """Tables with the same operation and widths."""

    def __init__(
        self,
        shapes: Sequence[RowShape],
        features: Sequence[FamilyFeature],
        num_features: int,
        index: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        # Projected rows are pooled narrow, [B, d] a feature side by side; the output's columns come after.
        self._columns = [feature.column for feature in features]
        if shapes[0].operation == Operation.PROJECT:
            narrow = shapes[0].widths[0]
            features = [replace(feature, column=k * narrow) for k, feature in enumerate(features)]
        super().__init__(shapes, features, num_features, index, device, dtype)

    @staticmethod
    def constants(shape: RowShape) -> Hashable:
        return shape.operation, shape.widths

    @staticmethod
    def num_keys(shape: RowShape) -> int:
        return shape.rows[0] * (1 if shape.operation in (Operation.ROW, Operation.PROJECT) else shape.rows[1])

    @staticmethod
    def num_parameters(shape: RowShape) -> int:
        return len(shape.rows)

    def forward(self, call: Call, parameters: Sequence[Tensor], out: Tensor, keep: bool) -> None:
        if self._operation == Operation.ROW:
            self._pool_rows(call, parameters, out)
        elif self._operation == Operation.PROJECT:
            narrow = self._pool_projected(call, parameters, out)
            if keep:
                call.kept[self.index] = narrow
        else:
            self._pool_pairs(call, parameters, out)

    def backward(self, call: Call, parameters: Sequence[Tensor], asked: Backward) -> list[Tensor | None]:
        if self._operation == Operation.ROW:
            return self._back_rows(call, parameters, asked)
        if self._operation == Operation.PROJECT:
            return self._back_projected(call, parameters, asked)
        return self._back_pairs(call, parameters, asked)

    def backward_without_ids(self, parameters: Sequence[Tensor], asked: Backward) -> list[Tensor | None]:
        if self._operation != Operation.PROJECT:
            return super().backward_without_ids(parameters, asked)
        rows: list[Tensor | None] = []
        for t, table in enumerate(parameters[0::2]):
            rows.append(torch.zeros_like(table) if asked.writes(t, 0, 2) else None)
        grad = torch.zeros(
            self._projection_entries.most, self._widths[1], dtype=torch.float32, device=self.device
        )
        projected = finish(self, self._projection_entries, grad, parameters, asked, 1)
        return [side for pair in zip(rows, projected, strict=True) for side in pair]

    # Stored rows

    def _pool_rows(self, call: Call, parameters: Sequence[Tensor], out: Tensor) -> None:
        pool(self, call, out, self._stored(call, parameters))

    def _stored(self, call: Call, parameters: Sequence[Tensor]) -> Rows:
        return Rows(self._sources(parameters, 0), self._rows(call), self._limits, self._widths[0])

    def _back_rows(self, call: Call, parameters: Sequence[Tensor], asked: Backward) -> list[Tensor | None]:
        entries, grad = self._row_entries(call, parameters, asked)
        return finish(self, entries, grad, parameters, asked, 0)

    def _row_entries(
        self, call: Call, parameters: Sequence[Tensor], asked: Backward
    ) -> tuple[Entries, Tensor]:
        """The rows of parameter 0 with their gradients; gradients of weights on the way."""
        width, plan = self._widths[0], call.plan
        if asked.grad_weights is not None:
            weigh(self, call, asked, self._stored(call, parameters))
        grad = row_gradients(self, call, asked.grad_out, width)
        cuts, base = plan.cuts[self.index : self.index + 2], call.keys.bounds[self.index :]
        return located(self, self._keys[0], plan.row_key, cuts, base), grad

    def _rows(self, call: Call) -> Tensor:
        """[L]: the row of parameter 0 at each position of the family's features."""
        if not any(feature.key_base for feature in self.own_features):
            return call.batch.ids
        base = [0] * self.num_features
        for feature in self.own_features:
            base[feature.number] = feature.key_base
        return call.batch.ids + self.remembered(tuple(base))[call.bag // call.batch.size]

    def _sources(self, parameters: Sequence[Tensor], which: int) -> Tensor:
        """[F]: the address of each feature's parameter."""
        own = parameters[which :: len(self._widths)]
        return self.addresses([own[feature.table] for feature in self.own_features])

    @cached_property
    def _limits(self) -> Tensor:
        """[F, 2]: the rows that each feature has."""
        return self.constant([[f.key_base, self.shapes[f.table].rows[0]] for f in self.own_features])

    # Projected rows

    def _pool_projected(self, call: Call, parameters: Sequence[Tensor], out: Tensor) -> Tensor:
        """Pool and project; returns the narrow bags, [B, F d]."""
        narrow, wide = self._widths
        bags = torch.empty(
            call.batch.size, len(self.own_features) * narrow, dtype=torch.float32, device=self.device
        )
        self._pool_rows(call, parameters, bags)
        for run in self._runs:
            torch.bmm(
                run.of(bags, run.narrow, narrow),
                self._projections(run, parameters),
                out=run.of(out, run.wide, wide),
            )
        return bags

    def _back_projected(
        self, call: Call, parameters: Sequence[Tensor], asked: Backward
    ) -> list[Tensor | None]:
        narrow, wide = self._widths
        bags: Tensor = call.kept[self.index]
        grad_bags = torch.empty_like(bags)
        grad = torch.zeros(len(self.shapes), narrow, wide, dtype=torch.float32, device=self.device)
        for run in self._runs:
            upstream = run.of(asked.grad_out, run.wide, wide)
            projections = self._projections(run, parameters).mT
            torch.bmm(upstream, projections, out=run.of(grad_bags, run.narrow, narrow))
            del projections  # before their gradients are made
            # Each table once: whatever adds them, sums have one order.
            own = over_samples(run.of(bags, run.narrow, narrow), upstream)
            grad.index_add_(0, self.remembered(run.tables), own)
            del own
        # The rows' step comes last: until then every kernel has read what the forward read.
        entries, grad_rows = self._row_entries(call, parameters, replace(asked, grad_out=grad_bags))
        rows = finish(self, entries, grad_rows, parameters, asked, 0)
        projected = finish(self, self._projection_entries, grad.view(-1, wide), parameters, asked, 1)
        return [side for pair in zip(rows, projected, strict=True) for side in pair]

    @staticmethod
    def _projections(run: Run, parameters: Sequence[Tensor]) -> Tensor:
        """[F, d, D] float32: those of a run's tables."""
        return torch.stack([parameters[2 * table + 1].detach() for table in run.tables]).float()

    @cached_property
    def _runs(self) -> list[Run]:
        narrow = self._widths[0]
        runs: list[Run] = []
        for feature, column in zip(self.own_features, self._columns, strict=True):
            longer = runs[-1].joined(feature.table, column) if runs else None
            if longer is None:
                runs.append(Run((feature.table,), (feature.column, narrow), (column, 0)))
            else:
                runs[-1] = longer
        return runs

    @cached_property
    def _projection_entries(self) -> Entries:
        tables, narrow = len(self.shapes), self._widths[0]
        places = [(t, row) for t in range(tables) for row in range(narrow)]
        # As on CPU, a step takes the whole projection, whatever the batch looks up.
        touched = torch.ones(len(places), dtype=torch.int32, device=self.device)
        table, row = (self.constant(part) for part in zip(*places, strict=True))
        return Entries(table, row, touched, self.constant([0, len(places)]), len(places))

    # Pairs of a quotient's and a remainder's part

    def _pool_pairs(self, call: Call, parameters: Sequence[Tensor], out: Tensor) -> None:
        batch = call.batch
        constants = pool_constants(self.shapes[0], self.dtype, batch.weights is not None)
        columns = cdiv(constants["W"], constants["BD"])
        pool_pairs[(cdiv(batch.size, constants["BB"]), len(self.own_features), columns)](
            out,
            self._sources(parameters, 0),
            self._sources(parameters, 1),
            batch.ids,
            batch.offsets if batch.weights is None else batch.weights,
            batch.offsets,
            self.features,
            self._pairs,
            batch.size,
            out.shape[1],
            batch.ids.numel(),
            **constants,
        )

    def _back_pairs(self, call: Call, parameters: Sequence[Tensor], asked: Backward) -> list[Tensor | None]:
        width, cuts = self.shapes[0].dim, call.plan.cuts[self.index :]
        split = self._split(call, parameters)
        if asked.grad_weights is not None:
            rows = Rows(self._pair_rows(call, split), call.plan.inverse, cuts, width)
            weigh(self, call, asked, rows)
        grad_rows = row_gradients(self, call, asked.grad_out, width)
        # A product's sides read each other: both gradients are complete before either side moves.
        sides = [self._side(split, grad_rows, which) for which in (0, 1)]
        found = [
            finish(self, entries, grad, parameters, asked, which)
            for which, (entries, grad) in enumerate(sides)
        ]
        return [side for pair in zip(*found, strict=True) for side in pair]

    def _split(self, call: Call, parameters: Sequence[Tensor]) -> _Split:
        plan, count = call.plan, call.batch.ids.numel()
        left, right, left_key, right_key = torch.empty(4, count, dtype=torch.int64, device=self.device)
        num_tables = len(self.shapes)
        constants = split_constants(self.shapes[0], self.dtype, num_tables)
        split_rows[(cdiv(count, constants["BR"]),)](
            left,
            right,
            left_key,
            right_key,
            plan.row_key,
            plan.cuts[self.index :],
            call.keys.bounds[self.index :],
            self._table_keys,
            self._radices,
            self._keys[0].first,
            self._keys[1].first,
            self.addresses(parameters[0::2]),
            self.addresses(parameters[1::2]),
            num_tables,
            count,
            **constants,
        )
        return _Split((left, right), (left_key, right_key))

    def _pair_rows(self, call: Call, split: _Split) -> Tensor:
        """[L, W] float32: the distinct rows."""
        count, width = call.batch.ids.numel(), self.shapes[0].dim
        rows = torch.empty(count, width, dtype=torch.float32, device=self.device)
        constants = pair_constants(self.shapes[0], self.dtype)
        pair_rows[(cdiv(count, constants["BR"]), cdiv(width, constants["BD"]))](
            rows,
            *split.part,
            call.plan.cuts[self.index :],
            **constants,
        )
        return rows

    def _side(self, split: _Split, grad_rows: Tensor, which: int) -> tuple[Entries, Tensor]:
        """The touched rows of one side of the pairs, and their gradients.

        Distinct rows are sorted by quotient; by remainder they are sorted here. Remainders are few and their
        runs long: pieces of them are summed first.
        """
        keys, key = self._keys[which], split.key[which]
        count, width = len(key), self._widths[which]
        order = key
        if which:
            key, order = torch.sort(key, stable=True)
        longest = max(shape.rows[1 - which] for shape in self.shapes)
        runs = runs_of(key, self.remembered((0, keys.total)), whole=longest <= _WHOLE)
        most = min(count, keys.total)
        pieces = most if longest <= _WHOLE else min(count, most + cdiv(count, PIECE))
        # Rows of earlier families make one more run of quotients.
        sums = torch.empty(min(count, pieces + 1), width, dtype=torch.float32, device=self.device)
        constants = side_constants(self.shapes[0], self.dtype, which)
        sum_sides[(cdiv(pieces, constants["BP"]), cdiv(width, constants["BD"]))](
            sums,
            grad_rows,
            order,
            runs.piece_first,
            runs.run_piece,
            runs.cuts,
            split.part[1 - which],
            **constants,
        )
        grad = sums
        if longest > _WHOLE:
            grad = torch.empty(min(count, most + 1), width, dtype=torch.float32, device=self.device)
            sum_segments(grad, sums, runs.run_piece, runs.cuts, most)
        return located(self, keys, runs.key, runs.cuts), grad

    @cached_property
    def _pairs(self) -> Tensor:
        """[F, 4]: key base, ids, radix and its reciprocal of each feature."""
        own = [(f.key_base, self.shapes[f.table]) for f in self.own_features]
        return self.constant([[base, self.num_ids(shape, base), *_radix(shape)] for base, shape in own])

    @cached_property
    def _keys(self) -> list[TableKeys]:
        """How the rows of each parameter are numbered over the tables."""
        return [
            TableKeys.of(self, [shape.rows[k] for shape in self.shapes]) for k in range(len(self._widths))
        ]

    @cached_property
    def _table_keys(self) -> Tensor:
        return TableKeys.of(self, [self.num_keys(shape) for shape in self.shapes]).first

    @cached_property
    def _radices(self) -> Tensor:
        """[tables, 2]: radix and its reciprocal."""
        return self.constant([_radix(shape) for shape in self.shapes])

    @property
    def _operation(self) -> Operation:
        return self.shapes[0].operation

    @property
    def _widths(self) -> tuple[int, ...]:
        return self.shapes[0].widths


def _radix(shape: RowShape) -> tuple[int, int]:
    """c, and what stands for a division by it."""
    return shape.rows[1], 2**62 // shape.rows[1]
