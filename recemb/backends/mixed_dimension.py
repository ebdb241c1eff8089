"""Mixed dimension embeddings (Ginart et al., arXiv 1909.11810): row i = E[i] P."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recemb.backends.base import Backend
from recemb.backends.low_rank import gram, leading_eigenvectors
from recemb.backends.row_split import RowSplit, split_by_id
from recemb.bags import Bags
from recemb.errors import ConfigError
from recemb.spec import MixedDimension, TableSpec
from recemb_kernels.lookup import TableShape
from recemb_kernels.pooled_gather import Operation, RowShape, pooled_gather


def mixed_dimension_dims(
    tables: Sequence[TableSpec], temperature: float, *, round_dims: bool = True
) -> list[int]:
    """d_i = lambda * n_i**(-temperature), with lambda such that the smallest table keeps its D.

    Clipped to [1, D_i]; ``round_dims`` rounds to the nearest power of two first, as in the paper.
    """
    if not 0 <= temperature <= 1:
        raise ConfigError(f"temperature={temperature!r} must be in [0, 1], e.g. 0.3")
    if not tables:
        return []
    smallest = min(table.num_embeddings for table in tables)
    dims = []
    for table in tables:
        dim = table.embedding_dim * (table.num_embeddings / smallest) ** -temperature
        rounded = 2 ** round(math.log2(dim)) if round_dims else round(dim)
        dims.append(min(table.embedding_dim, max(1, int(rounded))))
    return dims


class MixedDimensionBackend(Backend):
    """e [N, d] and p [d, D]; slot = id."""

    compression_type = MixedDimension
    slots_are_rows = True
    stepped_whole = frozenset({"p"})
    e: nn.Parameter
    p: nn.Parameter

    @classmethod
    def param_shapes(cls, tables: Sequence[TableSpec]) -> dict[str, tuple[int, int]]:
        (table,) = tables
        assert isinstance(table.compression, MixedDimension)
        dim = table.compression.dim
        return {"e": (table.num_embeddings, dim), "p": (dim, table.embedding_dim)}

    @classmethod
    def split_rows(cls, table: TableSpec, ranks: int) -> RowSplit:
        """E by id; every rank projects the sums of its own rows."""
        return split_by_id(table, "e", ranks)

    def map_ids(self, ids: Tensor) -> Tensor:
        return ids[:, None]

    def rows(self, slots: Tensor) -> Tensor:
        return self.e[slots[:, 0]] @ self.p

    def native_shape(self) -> TableShape:
        (rows, dim), columns = self.e.shape, self.p.shape[1]
        return TableShape(pooled_gather, RowShape(Operation.PROJECT, (rows, dim), (dim, columns)))

    def pooled_feature(self, bags: Bags) -> Tensor:
        # The projection is linear: pool the narrow rows first and project B bags instead of L ids.
        return self.pool(self.e, bags.ids, bags) @ self.p

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.e.normal_(0, self.table.row_std)
            self.p.normal_(0, self.p.shape[0] ** -0.5)

    def approximate(self, weight: Tensor) -> dict[str, Tensor]:
        """Truncated SVD, the best rank-d approximation (Eckart and Young, 1936)."""
        blocks = [weight[a:b] for a, b in self.row_blocks(0, weight.shape[0])]
        basis = leading_eigenvectors(gram(blocks), self.p.shape[0])
        e = torch.cat([(block.to(basis.dtype) @ basis).to(self.e.dtype) for block in blocks])
        return {"e": e, "p": basis.T}

    def written_parameters(self) -> Sequence[str]:
        return ("e",)

    def read_to_write_back(self) -> Sequence[str]:
        return ("p",)

    @torch.no_grad()
    def write_back(self, ids: Tensor, values: Tensor, cost: float) -> None:
        """Least squares, e[i] = values pinv(P): what of ``values`` lies in the row space of P.

        No other row changes, whatever the cost. Each row ends off by its distance from the row space of P, as
        near as P lets any row come. The table of rank d that is best for rows and values together has a P of
        its own, and may be nearer to them.
        """
        inverse = torch.linalg.pinv(self.p.double())
        self.e[ids] = (values.double() @ inverse).to(self.e.dtype)
