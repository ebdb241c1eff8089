"""Tensor-train tables (TT-Rec, Yin et al., MLSys 2021; TT-SVD, Oseledets, 2011).

row i = G_1[i_1] G_2[i_2] ... G_d[i_d], with G_k[i_k] of shape [R_{k-1}, q_k, R_k] and (i_1 .. i_d) the
mixed-radix digits of i in base p; the q axes, first core slowest, spell out the D columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recemb.backends.base import Backend
from recemb.backends.low_rank import truncated_factors
from recemb.backends.tt_shapes import core_sizes, table_shapes
from recemb.backends.tt_write_back import write_rows
from recemb.id_maps.radix import mixed_radix
from recemb.spec import TableSpec, TensorTrain
from recemb_kernels.lookup import TableShape
from recemb_kernels.tt_gather import MAX_ORDER, TrainShape, tt_gather

# TT-SVD is repeated until the rows beyond N settle, to a float32 rounding of the table.
_SWEEPS = 30
_CONVERGED = 1e-7


class TensorTrainBackend(Backend):
    """core_0 .. core_{d-1} of shape [p_k, R_{k-1} * q_k * R_k]; slots are the digits of the id."""

    compression_type = TensorTrain
    slots_are_rows = True

    @classmethod
    def param_shapes(cls, tables: Sequence[TableSpec]) -> dict[str, tuple[int, int]]:
        (table,) = tables
        row_shape, dim_shape = table_shapes(table)
        widths = core_sizes(dim_shape, _compression(table).ranks)
        return {f"core_{k}": shape for k, shape in enumerate(zip(row_shape, widths, strict=True))}

    @classmethod
    def stored_settings(cls, table: TableSpec, peers: Sequence[TableSpec]) -> dict[str, Any]:
        # The ranks follow from it and the cores' widths.
        return {"dim_shape": list(table_shapes(table)[1])}

    @property
    def cores(self) -> list[Tensor]:
        """The cores as [p_k, R_{k-1}, q_k, R_k]."""
        return self._unfold(self.weights())

    def _unfold(self, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        dims, ranks = table_shapes(self.table)[1], _compression(self.table).ranks
        return [parameters[f"core_{k}"].view(-1, ranks[k], q, ranks[k + 1]) for k, q in enumerate(dims)]

    def map_ids(self, ids: Tensor) -> Tensor:
        return mixed_radix(ids, table_shapes(self.table)[0])

    def rows(self, slots: Tensor) -> Tensor:
        return _contract(self.cores, slots)

    @property
    def row_numel(self) -> int:
        # A slice of each core is copied for every row, of one core at a time.
        return max(core_sizes(table_shapes(self.table)[1], _compression(self.table).ranks))

    def native_shape(self) -> TableShape | None:
        if self.lacks_kernel():
            return None
        return TableShape(tt_gather, TrainShape(*table_shapes(self.table), _compression(self.table).ranks))

    def lacks_kernel(self) -> str | None:
        row_shape, _ = table_shapes(self.table)
        if len(row_shape) > MAX_ORDER:
            return (
                f"tensor trains have kernels for up to {MAX_ORDER} cores, and this one has {len(row_shape)}"
            )
        # Digits are told apart by int64 products of the rows' shape.
        if math.prod(row_shape) >= 2**63:
            return "tensor trains have kernels for less than 2**63 rows"
        return None

    def reset_parameters(self) -> None:
        """Gaussian cores, scaled so that the elements of the product have variance ``row_std**2``.

        An element is a sum over prod(R_k) paths of products of d core entries, so i.i.d. cores of variance
        (row_std**2 / prod(R_k))**(1/d) are right in expectation for any d and R. (TT-Rec's code takes a cube
        root and leaves the rank out.) A product's realised scale still strays by tens of per cent when the
        cores are small; its norm has a closed form, so that is divided out.

        Rows of 0 take one core of 0, the largest, beside others as for rows of deviation 1: were all of them
        0, so would be every gradient.
        """
        paths = math.prod(_compression(self.table).ranks)
        parameters = list(self.own_parameters().values())
        variance = self.table.row_std**2 or 1.0
        std = (variance / paths) ** (0.5 / len(parameters))
        with torch.no_grad():
            for core in parameters:
                core.normal_(0, std)
            realised = self._mean_square()
            if realised > 0:
                for core in parameters:
                    core.mul_((variance / realised) ** (0.5 / len(parameters)))
            if self.table.row_std**2 == 0:
                max(parameters, key=torch.numel).zero_()

    def _mean_square(self) -> float:
        """Mean square of the elements of all prod(p) rows, by contracting the train with itself."""
        total, count = torch.ones(1, 1, dtype=torch.float64, device=self.cores[0].device), 1
        for core in self.cores:
            wide = core.double()
            half = torch.einsum("rs,prqt->psqt", total, wide)
            total = torch.einsum("psqt,psqu->tu", half, wide)
            count *= core.shape[0] * core.shape[2]
        return float(total) / count

    def approximate(self, weight: Tensor) -> dict[str, Tensor]:
        """TT-SVD: error**2 <= the sum over bonds of the singular values squared that the rank cuts off.

        Rows N .. prod(p) - 1 exist in the train only. They start at what a fit of the rows before them says
        and are then replaced by what each fit says of them, again and again (Mazumder et al., 2010), so that
        they do not cost the real rows.
        """
        rows, dims = table_shapes(self.table)
        padded = weight.new_zeros(math.prod(rows), weight.shape[1])
        padded[: weight.shape[0]] = weight
        spare = padded[weight.shape[0] :]
        _extrapolate(padded, weight.shape[0], rows, dims, _compression(self.table).ranks)
        digits = mixed_radix(torch.arange(weight.shape[0], padded.shape[0], device=weight.device), rows)
        scale = float(weight.double().norm())
        for _ in range(_SWEEPS):
            cores = _tt_svd(padded, rows, dims, _compression(self.table).ranks)
            fitted = _contract(self._unfold(cores), digits).to(spare.dtype)
            moved = float((fitted - spare).double().norm())
            spare.copy_(fitted)
            if moved <= _CONVERGED * scale:
                break
        return cores

    def read_to_write_back(self) -> Sequence[str]:
        """All cores: their Gram matrices weigh what a change does to the other rows."""
        return tuple(name for name, _ in self.layout)

    @torch.no_grad()
    def write_back(self, ids: Tensor, values: Tensor, cost: float) -> None:
        """Damped least squares, core by core (:mod:`recemb.backends.tt_write_back` has the bounds)."""
        write_rows(self.cores, self.map_ids(ids), values, cost)


def _contract(cores: Sequence[Tensor], slots: Tensor) -> Tensor:
    """[L, D]: the product of the cores' slices at each row of digits."""
    count = slots.shape[0]
    product = cores[0][slots[:, 0]].squeeze(1)  # [L, q_1, R_1]
    for k in range(1, len(cores)):
        _, rank, q, next_rank = cores[k].shape
        core = cores[k][slots[:, k]].view(count, rank, q * next_rank)
        product = torch.bmm(product, core).view(count, product.shape[1] * q, next_rank)
    return product.squeeze(2)


def _tt_svd(
    table: Tensor, rows: Sequence[int], dims: Sequence[int], ranks: Sequence[int]
) -> dict[str, Tensor]:
    """Cores of a [prod(p), D] table by successive truncated SVDs, first bond first (Oseledets, 2011)."""
    order = len(rows)
    # [p_1 .. p_d, q_1 .. q_d] -> [p_1, q_1, p_2, q_2, ..]
    axes = [axis for k in range(order) for axis in (k, order + k)]
    rest = table.view(*rows, *dims).permute(axes).reshape(rows[0] * dims[0], -1)
    cores = {}
    for k in range(order - 1):
        left, rest = truncated_factors(rest, ranks[k + 1])
        cores[f"core_{k}"] = _core(left, ranks[k], rows[k], dims[k])
        rest = rest.reshape(ranks[k + 1] * rows[k + 1] * dims[k + 1], -1)
    cores[f"core_{order - 1}"] = _core(rest, ranks[order - 1], rows[-1], dims[-1])
    return cores


def _extrapolate(
    padded: Tensor, known: int, rows: Sequence[int], dims: Sequence[int], ranks: Sequence[int]
) -> None:
    """Fill the rest of the first core's slice in which row ``known`` falls, in place.

    The slices before it are whole and give cores 2 .. d; the rows of this slice that are known then give
    its part of the first core by least squares. Later slices hold no known row and stay 0.
    """
    below = math.prod(rows[1:])
    whole, partial = divmod(known, below)
    if not whole or not partial:
        return
    cores = _tt_svd(padded[: whole * below], (whole, *rows[1:]), dims, ranks)
    tail = [cores[f"core_{k}"].view(-1, ranks[k], dims[k], ranks[k + 1]) for k in range(1, len(rows))]
    # The first bond joins the columns of the tail, which makes it a train of its own: [below, R_1, D / q_1].
    tail[0] = tail[0].view(rows[1], 1, ranks[1] * dims[1], ranks[2])
    digits = mixed_radix(torch.arange(below, device=padded.device), rows[1:])
    ends = _contract(tail, digits).view(below, ranks[1], -1)
    slice_ = padded[whole * below : (whole + 1) * below].view(below, dims[0], -1)
    equations = ends[:partial].transpose(1, 2).reshape(-1, ranks[1])
    values = slice_[:partial].double().transpose(1, 2).reshape(-1, dims[0])
    normal, target = equations.T @ equations, equations.T @ values
    head = torch.linalg.pinv(normal, hermitian=True, rtol=1e-12) @ target
    slice_[partial:] = torch.einsum("rq,irc->iqc", head, ends[partial:]).to(padded.dtype)


def _core(factor: Tensor, rank: int, rows: int, dim: int) -> Tensor:
    """[R_{k-1} * p_k * q_k, R_k] -> the stored [p_k, R_{k-1} * q_k * R_k]."""
    return factor.reshape(rank, rows, dim, -1).permute(1, 0, 2, 3).reshape(rows, -1)


def _compression(table: TableSpec) -> TensorTrain:
    assert isinstance(table.compression, TensorTrain)
    return table.compression
