"""Cached tables for the tests of ``recemb/cache``, driven through the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recemb.backends import build
from recemb.backends.base import Backend
from recemb.bags import Bags
from recemb.cache.hot_rows import HotRowCache
from recemb.cache.refresh import refresh
from recemb.engine import Engine
from recemb.spec import (
    ROBE,
    Compression,
    HotRows,
    MixedDimension,
    Pooling,
    QuotientRemainder,
    TableSpec,
    TensorTrain,
)

METHODS: dict[str, Any] = {
    "tt": lambda cache: TensorTrain(rank=8, cache=cache),
    "mult": lambda cache: QuotientRemainder(collisions=6, cache=cache),
    "add": lambda cache: QuotientRemainder(collisions=6, operation="add", cache=cache),
    "concat": lambda cache: QuotientRemainder(collisions=6, operation="concat", cache=cache),
    "robe": lambda cache: ROBE(compress_rate=4, block_size=8, cache=cache),
    "md": lambda cache: MixedDimension(dim=3, cache=cache),
}


def spec(
    compression: Compression,
    rows: int = 60,
    dim: int = 8,
    *,
    name: str = "t",
    features: Sequence[str] = (),
    pooling: Pooling = "sum",
) -> TableSpec:
    """A table whose fresh rows are of order 1/2."""
    return TableSpec(
        name=name,
        num_embeddings=rows,
        embedding_dim=dim,
        feature_names=tuple(features),
        pooling=pooling,
        compression=compression,
        init_std=0.5,
    )


class Collection(nn.Module):
    """Built tables and the engine that looks them up."""

    def __init__(self, tables: Sequence[TableSpec]) -> None:
        super().__init__()
        self.tables = nn.ModuleDict(build(tables, torch.device("cpu")))
        for backend in self.tables.values():
            backend.reset_parameters()
        self.engine = Engine(tables)

    def forward(self, bags: Bags) -> Tensor:
        out: Tensor = self.engine(self.tables, bags)
        return out

    def backend(self, name: str = "t") -> Backend:
        backend = self.tables[name]
        assert isinstance(backend, Backend)
        return backend

    def cache(self, name: str = "t") -> HotRowCache:
        cache = self.backend(name).cache
        assert cache is not None
        return cache


def hold(collection: Collection, ids: Sequence[int], name: str = "t") -> HotRowCache:
    """Put some rows into a cache by making them hot, at their compressed values."""
    cache = collection.cache(name)
    with torch.no_grad():
        cache.owners.fill_(-1)
        cache.votes.zero_()
        cache.owners[: len(ids)] = torch.tensor(ids)
        # Hotter by far than those whose places they take.
        held = cache.scores[cache.ids >= 0].sort().values
        taken = len(ids) - (cache.capacity - len(held))
        cache.votes[: len(ids)] = max(1e6, 4 * float(held[taken - 1]) if taken > 0 else 0.0)
    refresh([collection.backend(name)])
    assert set(ids) <= set(cache.ids.tolist())
    return cache


def one_id_bags(ids: Sequence[int]) -> Bags:
    """A batch of one feature, one id a bag."""
    return Bags(torch.tensor(ids, dtype=torch.int64), torch.arange(len(ids) + 1), 1)


def forever(**settings: Any) -> HotRows:
    """A cache that exchanges rows only when told to."""
    return HotRows(warmup=10**9, refresh_every=10**9, track_every=1, **settings)
