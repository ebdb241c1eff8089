"""The one path of a lookup: ids -> one fused call, or one per method where kernels differ -> [B, sum of D].

The unsharded module calls it in its forward, and a sharded rank calls it on its local tables, so that
eager, sharded and cached use cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recemb.backends import backend_of
from recemb.backends.base import Backend
from recemb.backends.native import pooled_native
from recemb.bags import Bags, LookupTarget, LookupTargets, check_bags
from recemb.spec import TableSpec


@dataclass(frozen=True)
class _Group:
    """The features whose tables one backend serves, by position in the batch."""

    backend: type[Backend]
    features: tuple[int, ...]


class Engine:
    """Looks up every feature of a set of tables, table by table and feature by feature in their order.

    Args:
        tables: the tables; feature f of a batch is the f-th entry of ``targets``.
    """

    def __init__(self, tables: Sequence[TableSpec]) -> None:
        lookups = [(feature, table) for table in tables for feature in table.feature_names]
        self.targets = LookupTargets(
            LookupTarget(feature, table.name, table.num_embeddings) for feature, table in lookups
        )
        self.dims = tuple(table.embedding_dim for _, table in lookups)
        members: dict[type[Backend], list[int]] = {}
        for f, (_, table) in enumerate(lookups):
            members.setdefault(backend_of(table), []).append(f)
        self._groups = tuple(_Group(backend, tuple(features)) for backend, features in members.items())

    def __call__(self, tables: Mapping[str, Backend], bags: Bags) -> Tensor:
        """Pool a batch.

        Args:
            tables: the backends by table name.
            bags: one feature per entry of ``targets``, in that order.

        Returns:
            [B, sum of D over the features], columns in the order of ``targets``.

        Raises:
            BatchError: malformed bags or an id without a row, before anything is computed.
        """
        check_bags(bags, self.targets)
        served = [tables[target.table] for target in self.targets]
        if len(self._groups) > 1:
            # The native kernels serve all methods at once, and write every column in its place.
            whole = pooled_native(served, bags)
            if whole is not None:
                return whole
        outputs = [
            group.backend.pooled([served[f] for f in group.features], selected)
            for group in self._groups
            for selected in (bags.select(group.features),)
        ]
        if len(outputs) == 1:
            return outputs[0]
        columns: dict[int, Tensor] = {}
        for group, output in zip(self._groups, outputs, strict=True):
            pieces = torch.split(output, [self.dims[f] for f in group.features], dim=1)
            columns.update(zip(group.features, pieces, strict=True))
        return torch.cat([columns[f] for f in range(len(self.targets))], dim=1)
