"""Arithmetic and memory traffic of looking a compressed table up, by its method.

Counted as ``kernels/README.md`` states them per distinct row. How many rows of a batch are distinct depends
on the skew of the ids, which is a constant of the cost model: with probabilities p_i ~ i**-a, L look-ups meet
sum (1 - (1 - p_i)**L) rows on average; a = 0 is uniform ids, the most there can be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from recemb.backends import backend_of
from recemb.backends.tt_shapes import core_sizes, table_shapes
from recemb.id_maps.radix import ceil_div
from recemb.spec import DTYPE_BYTES, ROBE, MixedDimension, QuotientRemainder, TableSpec, TensorTrain

_FLOAT = 4
_ID = 8
# Integer operations of hashing one block (kernels/README.md).
_HASH_OPS = 20


@dataclass(frozen=True)
class Work:
    """Of one forward look-up.

    Attributes:
        ids: look-ups.
        flop: floating-point operations.
        num_bytes: of parameters, read once per distinct row or core slice, ids, and pooled rows written.
    """

    ids: float
    flop: float
    num_bytes: float


@dataclass(frozen=True)
class Load:
    """A table and what is looked up in it.

    Args:
        table: a compressed table.
        ids: of a step, over all ranks.
        bags: of all its features, over all ranks.
    """

    table: TableSpec
    ids: float
    bags: float


@lru_cache(maxsize=2**16)
def distinct(rows: int, lookups: float, skew: float = 0.0) -> float:
    """Mean number of distinct rows among ``lookups`` ids of a table, Zipf with exponent ``skew``."""
    if rows == 1:
        return min(1.0, lookups)
    # Ranks 1 .. 63 alone, the rest in bands over which a power law hardly changes.
    edges = np.unique(np.concatenate([np.arange(1, 64), np.geomspace(64, rows + 1, 256)]))
    edges = np.append(edges[edges < rows + 1], rows + 1)
    counts = np.diff(edges)
    weights = (edges[:-1] + counts / 2 - 0.5) ** -skew
    probability = np.minimum(weights / (weights @ counts), 1 - 1e-12)
    return float(-counts @ np.expm1(lookups * np.log1p(-probability)))


def forward_work(table: TableSpec, lookups: float, bags: float, skew: float = 0.0) -> Work:
    """Of looking ``lookups`` ids up in a compressed table and pooling them to ``bags`` rows of D.

    With cached rows a batch is looked up as two streams. The cached one counts on top, and hits are not taken
    off the other: what they save, splitting the batch takes back.

    Args:
        table: a compressed table.
        skew: Zipf exponent of the ids.
    """
    work = _compressed(table, lookups, bags, skew)
    if not table.cache_rows:
        return work
    dim = table.embedding_dim
    rows = distinct(table.cache_rows, lookups, skew) * dim * DTYPE_BYTES[table.dtype]
    streams = lookups * _ID + bags * dim * _FLOAT
    return replace(work, flop=work.flop + bags * dim, num_bytes=work.num_bytes + rows + streams)


def _compressed(table: TableSpec, lookups: float, bags: float, skew: float) -> Work:
    dim, element = table.embedding_dim, DTYPE_BYTES[table.dtype]
    rows = distinct(table.num_embeddings, lookups, skew)
    compression = table.compression
    # Ids read and pooled rows written; rows that were read once are added up out of a cache.
    pooling = lookups * _ID + bags * dim * _FLOAT
    adding = lookups * dim
    if isinstance(compression, TensorTrain):
        flop, read = _tensor_train(table, compression, rows, lookups, skew)
        return Work(lookups, flop + adding, read * element + pooling)
    if isinstance(compression, QuotientRemainder):
        parts = 1 if compression.operation == "concat" else 2
        combined = 0 if compression.operation == "concat" else rows * dim
        return Work(lookups, combined + adding, rows * dim * parts * element + pooling)
    if isinstance(compression, MixedDimension):
        # Pooled narrow, then projected.
        narrow = compression.dim
        flop = lookups * narrow + 2 * bags * narrow * dim
        read = rows * narrow * element + lookups * _ID + bags * (narrow + dim) * _FLOAT
        return Work(lookups, flop, read)
    if isinstance(compression, ROBE):
        blocks = ceil_div(dim, compression.block_size)
        read = rows * dim * element + pooling
        return Work(lookups, rows * blocks * _HASH_OPS + adding, read)
    raise AssertionError(f"{table.compression} is not a compression that takes work of its own")


def _tensor_train(
    table: TableSpec, train: TensorTrain, rows: float, lookups: float, skew: float
) -> tuple[float, float]:
    """FLOP and elements read, each product of cores once per distinct prefix of the digits."""
    row_shape, dim_shape = table_shapes(table)
    ranks, sizes = train.ranks, core_sizes(dim_shape, train.ranks)
    flop = read = 0.0
    for k, size in enumerate(sizes):
        blocks = math.prod(row_shape[: k + 1])
        prefixes = rows if k == len(sizes) - 1 else min(rows, distinct(blocks, lookups, skew))
        # A core has no more slices than its digit has values.
        read += min(prefixes, float(row_shape[k])) * size
        if k:
            flop += 2 * math.prod(dim_shape[: k + 1]) * ranks[k] * ranks[k + 1] * prefixes
    return flop, read


def parameter_shapes(tables: list[TableSpec]) -> dict[str, tuple[int, int]]:
    """Shapes of the parameters of one storage, with the cached rows of its tables."""
    cached = {f"{t.name}.cache": (t.cache_rows, t.embedding_dim) for t in tables if t.cache_rows}
    return backend_of(tables[0]).param_shapes(tables) | cached


def parameter_bytes(tables: list[TableSpec]) -> int:
    """Bytes of these parameters, exactly."""
    numel = sum(map(math.prod, parameter_shapes(tables).values()))
    return numel * DTYPE_BYTES[tables[0].dtype]


def optimizer_bytes(tables: list[TableSpec], optimizer: str | None) -> int:
    """Bytes of the optimizer state of one storage: a sum a row, one or two values a weight, or nothing.

    Args:
        optimizer: the name of its class, ``None`` for none.
    """
    shapes = parameter_shapes(tables).values()
    if optimizer in (None, "SGD"):
        return 0
    if optimizer == "RowWiseAdagrad":
        return _FLOAT * sum(rows for rows, _ in shapes)
    return (2 if optimizer == "Adam" else 1) * parameter_bytes(tables)
