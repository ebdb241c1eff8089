"""The uncompressed table: ``nn.EmbeddingBag`` to the bit, outputs and gradients.

Under a fused optimizer, and without gradients, the native kernel looks it up: the same bits again, but for
weighted bags, which may differ by a rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recemb.backends.base import Backend
from recemb.backends.row_split import RowSplit, split_by_id
from recemb.bags import Bags
from recemb.spec import Dense, TableSpec
from recemb_kernels.lookup import TableShape
from recemb_kernels.pooled_gather import Operation, RowShape, pooled_gather


class DenseBackend(Backend):
    """weight [N, D]; slot = id."""

    compression_type = Dense
    slots_are_rows = True
    # With a fused optimizer no gradient of N x D is made. Without one, plain torch: the same bits as
    # nn.EmbeddingBag, and a gradient for the user's own optimizer.
    native_when_fused = True
    weight: nn.Parameter

    @classmethod
    def param_shapes(cls, tables: Sequence[TableSpec]) -> dict[str, tuple[int, int]]:
        (table,) = tables
        return {"weight": (table.num_embeddings, table.embedding_dim)}

    @classmethod
    def split_rows(cls, table: TableSpec, ranks: int) -> RowSplit:
        return split_by_id(table, "weight", ranks)

    def map_ids(self, ids: Tensor) -> Tensor:
        return ids[:, None]

    def rows(self, slots: Tensor) -> Tensor:
        return self.weight[slots[:, 0]]

    def native_shape(self) -> TableShape:
        return TableShape(
            pooled_gather, RowShape(Operation.ROW, (len(self.weight),), (self.weight.shape[1],))
        )

    def pooled_feature(self, bags: Bags) -> Tensor:
        return self.pool(self.weight, bags.ids, bags)

    def reset_parameters(self) -> None:
        bound = 3**0.5 * self.table.row_std
        with torch.no_grad():
            self.weight.uniform_(-bound, bound)

    def approximate(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight}
