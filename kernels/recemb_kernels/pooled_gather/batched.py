"""Products of all projected tables at once, by torch; none of them is one that autocast rounds (``out=``)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# More samples are too long a sum for one block of a GPU's threads a table: each table's product is cut by
# cuBLAS then, which it does for products that are not batched.
_BATCHED_SAMPLES = 4096


@dataclass(frozen=True)
class Run:
    """Neighbouring features of as many tables, whose columns are evenly spaced: one batched product.

    Attributes:
        tables: [F] theirs, by place in the family.
        narrow: the first one's column of the narrow bags, and columns from one to the next.
        wide: the same of the output; 0 columns from one to the next while there is one.
    """

    tables: tuple[int, ...]
    narrow: tuple[int, int]
    wide: tuple[int, int]

    def joined(self, table: int, column: int) -> Run | None:
        """With a feature more, or ``None`` where that is not evenly spaced, or has a table twice."""
        first, known = self.wide
        spacing = known or column - first
        if table in self.tables or column != first + spacing * len(self.tables):
            return None
        return replace(self, tables=(*self.tables, table), wide=(first, spacing))

    def of(self, tensor: Tensor, columns: tuple[int, int], width: int) -> Tensor:
        """[F, B, width]: the features' columns of a tensor [B, .]."""
        first, spacing = columns
        rows, across = tensor.shape[0], tensor.stride(0)
        at = tensor.storage_offset() + first
        return tensor.as_strided((len(self.tables), rows, width), (spacing, across, 1), at)


def over_samples(narrow: Tensor, wide: Tensor) -> Tensor:
    """[F, d, D] float32: of each table ``narrow``.T @ ``wide``, [F, B, d] and [F, B, D]."""
    out = narrow.new_empty(narrow.shape[0], narrow.shape[2], wide.shape[2])
    if narrow.shape[1] <= _BATCHED_SAMPLES:
        return torch.bmm(narrow.mT, wide, out=out)
    for own, *factors in zip(out, narrow.mT, wide, strict=True):
        torch.mm(*factors, out=own)
    return out
