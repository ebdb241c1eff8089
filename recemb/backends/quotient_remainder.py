"""Quotient-remainder trick (Shi et al., KDD 2020, arXiv 1909.02107).

row i = E_q[i // c] o E_r[i mod c]. The public dlrm code pools both sides first and combines the sums, which
is another function as soon as a bag holds two ids; here rows are combined before pooling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from recemb.backends.base import Backend
from recemb.backends.row_split import RowSplit, even_rows
from recemb.id_maps.radix import ceil_div, quotient_remainder
from recemb.spec import QuotientRemainder, TableSpec
from recemb_kernels.lookup import TableShape
from recemb_kernels.pooled_gather import MAX_RADIX, Operation, RowShape, pooled_gather

# Under "mult" the shorter table starts around 1 with this deviation: wide enough that ids that share a row
# differ from the start, narrow enough that gradients reach the longer table at full size.
_FACTOR_STD = 12**-0.5
_SWEEPS = 50
# Singular directions followed at once; only their first is kept.
_SUBSPACE = 8
_SUBSPACE_SWEEPS = 20
# A factor this small against its table's, in mean square, is not divided by in full.
_TINY_FACTOR = 0.01


class QuotientRemainderBackend(Backend):
    """q [ceil(N/c), D_q] and r [c, D_r]; D_q = D_r = D, or D_q + D_r = D under ``concat``."""

    compression_type = QuotientRemainder
    slots_are_rows = True
    q: nn.Parameter
    r: nn.Parameter

    @classmethod
    def param_shapes(cls, tables: Sequence[TableSpec]) -> dict[str, tuple[int, int]]:
        (table,) = tables
        compression = _compression(table)
        quotients = ceil_div(table.num_embeddings, compression.collisions)
        dim = table.embedding_dim
        left, right = (dim // 2, dim - dim // 2) if compression.operation == "concat" else (dim, dim)
        return {"q": (quotients, left), "r": (compression.collisions, right)}

    @classmethod
    def stored_settings(cls, table: TableSpec, peers: Sequence[TableSpec]) -> dict[str, Any]:
        return {"operation": _compression(table).operation}

    @classmethod
    def split_rows(cls, table: TableSpec, ranks: int) -> RowSplit:
        """The longer of the two tables: quotients by id range, remainders with all ids that share one."""
        compression, shapes = _compression(table), cls.param_shapes([table])
        quotients, collisions = shapes["q"][0], shapes["r"][0]
        if _longer(table) == "q":
            sizes = even_rows(table, "q", quotients, ranks)
            tables = [
                replace(table, num_embeddings=size * collisions, pooling="sum", part_of=table)
                for size in sizes
            ]
            return RowSplit("q", sizes, tables, sizes[0] * collisions)
        sizes = even_rows(table, "r", collisions, ranks)
        tables = [
            replace(
                table,
                num_embeddings=quotients * size,
                pooling="sum",
                part_of=table,
                compression=replace(compression, collisions=size),
            )
            for size in sizes
        ]
        return _RemainderSplit("r", sizes, tables, quotients * sizes[0])

    def map_ids(self, ids: Tensor) -> Tensor:
        return quotient_remainder(ids, _compression(self.table).collisions)

    def rows(self, slots: Tensor) -> Tensor:
        return self._combine(self.q[slots[:, 0]], self.r[slots[:, 1]])

    def _combine(self, left: Tensor, right: Tensor) -> Tensor:
        operation = _compression(self.table).operation
        if operation == "mult":
            return left * right
        if operation == "add":
            return left + right
        return torch.cat((left, right), dim=-1)

    def native_shape(self) -> TableShape | None:
        if self.lacks_kernel():
            return None
        (quotients, left), (remainders, right) = self.q.shape, self.r.shape
        operation = Operation[_compression(self.table).operation.upper()]
        return TableShape(pooled_gather, RowShape(operation, (quotients, remainders), (left, right)))

    def lacks_kernel(self) -> str | None:
        if max(len(self.q), len(self.r)) > MAX_RADIX:
            return f"quotient-remainder tables have kernels for up to {MAX_RADIX:,} rows each"
        return None

    def reset_parameters(self) -> None:
        std, operation = self.table.row_std, _compression(self.table).operation
        with torch.no_grad():
            if operation == "mult":
                longer, shorter = (self.q, self.r) if _longer(self.table) == "q" else (self.r, self.q)
                half = math.sqrt(3) * _FACTOR_STD
                shorter.uniform_(1 - half, 1 + half)
                longer.normal_(0, std / math.sqrt(1 + _FACTOR_STD**2))
            else:
                part = std / math.sqrt(2) if operation == "add" else std
                self.q.normal_(0, part)
                self.r.normal_(0, part)

    def approximate(self, weight: Tensor) -> dict[str, Tensor]:
        """Least squares: exact group means for ``concat``, alternating least squares for the others.

        Under ``add`` each half step is a closed form, so the error never rises; ``mult`` is one rank-1 SVD
        per column, exact for whole quotient groups.
        """
        quotients, collisions = self.q.shape[0], self.r.shape[0]
        operation, split = _compression(self.table).operation, self.q.shape[1]
        present = torch.ones(quotients * collisions, dtype=torch.float64, device=weight.device)
        present[weight.shape[0] :] = 0
        present = present.view(quotients, collisions)
        q, r = self.q.double(), self.r.double()
        # Column by column: the columns are independent, and one fp64 column is all that is held at a time.
        for column in range(weight.shape[1]):
            grid = torch.zeros_like(present)
            grid.view(-1)[: weight.shape[0]] = weight[:, column]
            if operation == "mult":
                q[:, column], r[:, column] = _fit_product(grid, present)
            elif operation == "add":
                q[:, column], r[:, column] = _fit_sum(grid, present)
            elif column < split:
                q[:, column] = grid.sum(1) / present.sum(1)
            else:
                r[:, column - split] = grid.sum(0) / present.sum(0)
        return {"q": q, "r": r}

    def written_parameters(self) -> Sequence[str]:
        if _compression(self.table).operation == "concat":
            return ("q", "r")
        return (_longer(self.table),)

    def read_to_write_back(self) -> Sequence[str]:
        """Under ``mult`` the factors of the other side, which weigh what a change does to the other rows."""
        if _compression(self.table).operation != "mult":
            return ()
        return ("r",) if _longer(self.table) == "q" else ("q",)

    @torch.no_grad()
    def write_back(self, ids: Tensor, values: Tensor, cost: float) -> None:
        """Damped least squares on the longer table (on both under ``concat``), whose rows fewer ids share.

        Without a cost that is exact where no two of ``ids`` share such a row, and the mean of what they ask
        for where they do; but under ``mult`` an element whose factor on the other side is below a tenth of
        that side's root mean square is approached only: dividing by it would throw the others far off.
        """
        slots = self.map_ids(ids)
        residual = values.double() - self.rows(slots).double()
        split = self.q.shape[1]
        if _compression(self.table).operation == "concat":
            ones = residual.new_ones(1, 1)
            self._step(0, slots, residual[:, :split], ones.expand(len(self.r), split), cost)
            self._step(1, slots, residual[:, split:], ones.expand(len(self.q), self.r.shape[1]), cost)
            return
        side = int(_longer(self.table) == "r")
        other = (self.r, self.q)[side].double()
        multiplies = _compression(self.table).operation == "mult"
        self._step(side, slots, residual, other if multiplies else torch.ones_like(other), cost)

    def _step(self, side: int, slots: Tensor, residual: Tensor, factor: Tensor, cost: float) -> None:
        """Move rows of E_q (side 0) or E_r (1), which rows of the table are times ``factor``.

        Args:
            slots: [E, 2].
            residual: [E, width] what the rows lack.
            factor: one row for each of the other side.
        """
        parameter = (self.q, self.r)[side]
        rows, index = torch.unique(slots[:, side], return_inverse=True)
        own = factor[slots[:, 1 - side]]
        square, product = (residual.new_zeros(len(rows), residual.shape[1]) for _ in range(2))
        square.index_add_(0, index, own.square())
        product.index_add_(0, index, own * residual)
        everyone = factor.square().sum(dim=0)
        floor = _TINY_FACTOR * everyone / len(factor)
        weight = torch.maximum(square + cost * (everyone - square).clamp(min=0), floor)
        change = torch.where(weight > 0, product / weight, torch.zeros_like(product))
        parameter[rows] = (parameter[rows].double() + change).to(parameter.dtype)


def _fit_sum(grid: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """q, r that minimise sum present * (grid - q - r)**2; ``grid`` is 0 where absent."""
    r = grid.new_zeros(grid.shape[1])
    for _ in range(_SWEEPS):
        q = (grid - present * r).sum(1) / present.sum(1)
        r = (grid - present * q[:, None]).sum(0) / present.sum(0)
    return q, r


def _fit_product(grid: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """q, r that minimise sum present * (grid - q * r)**2; ``grid`` is 0 where absent.

    For whole groups this is the leading singular pair, found by subspace iteration: a single vector
    converges slowly when the next singular value is close, and never leaves a start that is orthogonal to the
    leading direction. Absent cells, all in the last group, take what the fit says of them; alternating least
    squares over the present cells ends it, which settles faster when much of a small table is absent.
    """
    width = min(_SUBSPACE, *grid.shape)
    generator = torch.Generator(device=grid.device).manual_seed(0)
    start = torch.randn(grid.shape[0], width, dtype=grid.dtype, device=grid.device, generator=generator)
    absent, filled = present[-1] == 0, grid.clone()
    basis = torch.linalg.qr(filled.T @ start).Q
    for _ in range(_SUBSPACE_SWEEPS):
        basis = torch.linalg.qr(filled.T @ (filled @ basis)).Q
        inside = filled @ basis
        top = torch.linalg.eigh(inside.T @ inside).eigenvectors[:, -1]
        q, r = inside @ top, basis @ top
        filled[-1, absent] = q[-1] * r[absent]
    if not bool(absent.any()):
        return q, r
    tiny = torch.finfo(grid.dtype).tiny
    for _ in range(_SWEEPS):
        q = (grid * r).sum(1) / (present * r.square()).sum(1).clamp(min=tiny)
        r = (grid * q[:, None]).sum(0) / (present * q[:, None].square()).sum(0).clamp(min=tiny)
    return q, r


@dataclass(frozen=True)
class _RemainderSplit(RowSplit):
    """Rank k has ``rows[k]`` remainders: its table is of the same quotients and of those remainders."""

    def number(self, ids: Tensor) -> Tensor:
        remainders = sum(self.rows)
        quotient, remainder = quotient_remainder(ids, remainders).unbind(1)
        rank = remainder // self.rows[0]
        first = rank * self.rows[0]
        own = torch.clamp(remainders - first, max=self.rows[0])
        return rank * self.ids_per_rank + quotient * own + remainder - first


def _longer(table: TableSpec) -> str:
    """Which of the two tables has more rows; of a part of the rows, as it is in the whole."""
    whole = table if table.part_of is None else table.part_of
    collisions = _compression(whole).collisions
    return "r" if collisions > ceil_div(whole.num_embeddings, collisions) else "q"


def _compression(table: TableSpec) -> QuotientRemainder:
    assert isinstance(table.compression, QuotientRemainder)
    return table.compression
