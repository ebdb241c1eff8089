"""Quotient-remainder trick (Shi et al., KDD 2020, arXiv 1909.02107).

row i = E_q[i // c] o E_r[i mod c]. The public dlrm code pools both sides first and combines the sums, which
is another function as soon as a bag holds two ids; here rows are combined before pooling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recemb.backends.base import Backend
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
        (quotients, left), (remainders, right) = self.q.shape, self.r.shape
        if max(quotients, remainders) > MAX_RADIX:
            return None
        operation = Operation[_compression(self.table).operation.upper()]
        return TableShape(pooled_gather, RowShape(operation, (quotients, remainders), (left, right)))

    def reset_parameters(self) -> None:
        std, operation = self.table.row_std, _compression(self.table).operation
        with torch.no_grad():
            if operation == "mult":
                longer, shorter = (self.q, self.r) if len(self.q) >= len(self.r) else (self.r, self.q)
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

    @torch.no_grad()
    def write_back(self, ids: Tensor, values: Tensor) -> None:
        """Least squares on the longer table (on both under ``concat``), whose rows fewer ids share.

        Exact where no two of ``ids`` share such a row: the mean of what they ask for where they do. Under
        ``mult`` an element whose factor on the other side is below a tenth of that side's root mean square is
        approached only, because the other ids of the row would be moved by more than it gains.
        """
        slots = self.map_ids(ids)
        residual = (values - self.rows(slots)).double()
        q, r = slots[:, 0], slots[:, 1]
        operation = _compression(self.table).operation
        if operation == "concat":
            _add_mean(self.q, q, residual[:, : self.q.shape[1]])
            _add_mean(self.r, r, residual[:, self.q.shape[1] :])
            return
        longer, own, shorter, other = (self.q, q, self.r, r)
        if len(self.r) > len(self.q):
            longer, own, shorter, other = self.r, r, self.q, q
        if operation == "add":
            _add_mean(longer, own, residual)
            return
        factor = shorter[other].double()
        floor = _TINY_FACTOR * shorter.double().square().mean()
        rows, index = torch.unique(own, return_inverse=True)
        square, product = (factor.new_zeros(len(rows), factor.shape[1]) for _ in range(2))
        square.index_add_(0, index, factor.square())
        product.index_add_(0, index, factor * residual)
        change = product / square.clamp(min=float(floor))
        longer[rows] = (longer[rows].double() + change.nan_to_num(0, 0, 0)).to(longer.dtype)


def _add_mean(parameter: Tensor, index: Tensor, change: Tensor) -> None:
    """Add to each row of ``index`` the mean of what is asked of it."""
    rows, inverse, counts = torch.unique(index, return_inverse=True, return_counts=True)
    total = change.new_zeros(len(rows), change.shape[1]).index_add_(0, inverse, change)
    parameter[rows] = (parameter[rows].double() + total / counts[:, None]).to(parameter.dtype)


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


def _compression(table: TableSpec) -> QuotientRemainder:
    assert isinstance(table.compression, QuotientRemainder)
    return table.compression
