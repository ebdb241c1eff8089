"""Arithmetic, memory traffic and workspace of looking a compressed table up, by its method.

Counted as ``kernels/README.md`` states them per distinct row. How many rows of a batch are distinct depends
on the skew of the ids, which is a constant of the cost model: with probabilities p_i ~ i**-a, L look-ups meet
sum (1 - (1 - p_i)**L) rows on average; a = 0 is uniform ids, the most there can be. The workspace is bounded
for those, whatever the skew.
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
# Ranks are padded to whole vectors of these.
_LANES = 8
# A block's start and what it belongs to; in arrays of 2**32 weights and more it takes twice as much.
_RECORD = 8
# The arrays of these begin at different places of different pages.
_PAGES = 4 * 5000
# Integer operations of hashing one block (kernels/README.md).
_HASH_OPS = 20


@dataclass(frozen=True)
class Work:
    """Of one forward look-up.

    Attributes:
        ids: look-ups.
        flop: floating-point operations.
        num_bytes: of parameters, read once per distinct row or core slice, ids, and pooled rows written.
        workspace: bytes that a micro-batch's products, what they send back, and its rows take on a CPU;
            :mod:`recemb.planner.gpu_workspace` counts a GPU's.
    """

    ids: float
    flop: float
    num_bytes: float
    workspace: int


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


def forward_work(
    table: TableSpec, lookups: float, bags: float, micro_batch_rows: int, skew: float = 0.0
) -> Work:
    """Of looking ``lookups`` ids up in a compressed table and pooling them to ``bags`` rows of D.

    With cached rows a batch is looked up as two streams. The cached one counts on top, and hits are not taken
    off the other: what they save, splitting the batch takes back.

    Args:
        table: a compressed table.
        micro_batch_rows: distinct rows whose products are held at once.
        skew: Zipf exponent of the ids.
    """
    work = _compressed(table, lookups, bags, micro_batch_rows, skew)
    if not table.cache_rows:
        return work
    dim = table.embedding_dim
    rows = distinct(table.cache_rows, lookups, skew) * dim * DTYPE_BYTES[table.dtype]
    streams = lookups * _ID + bags * dim * _FLOAT
    return replace(work, flop=work.flop + bags * dim, num_bytes=work.num_bytes + rows + streams)


def _compressed(table: TableSpec, lookups: float, bags: float, micro_batch_rows: int, skew: float) -> Work:
    dim, element = table.embedding_dim, DTYPE_BYTES[table.dtype]
    rows = distinct(table.num_embeddings, lookups, skew)
    compression = table.compression
    # Ids read and pooled rows written; rows that were read once are added up out of a cache.
    pooling = lookups * _ID + bags * dim * _FLOAT
    adding = lookups * dim
    held = min(distinct(table.num_embeddings, lookups), float(micro_batch_rows))
    if isinstance(compression, TensorTrain):
        flop, read = _tensor_train(table, compression, rows, lookups, skew)
        # Rows themselves where bags hold several.
        workspace = (_products(table, compression, held) + held * dim) * _FLOAT
        return Work(lookups, flop + adding, read * element + pooling, math.ceil(workspace))
    if isinstance(compression, QuotientRemainder):
        parts = 1 if compression.operation == "concat" else 2
        combined = 0 if compression.operation == "concat" else rows * dim
        flop, read = combined + adding, rows * dim * parts * element
        return Work(lookups, flop, read + pooling, math.ceil(2 * held * dim * _FLOAT))
    if isinstance(compression, MixedDimension):
        # Pooled narrow, then projected.
        narrow = compression.dim
        flop = lookups * narrow + 2 * bags * narrow * dim
        read = rows * narrow * element + lookups * _ID + bags * (narrow + dim) * _FLOAT
        return Work(lookups, flop, read, math.ceil(2 * (held + bags) * narrow * _FLOAT))
    if isinstance(compression, ROBE):
        blocks = ceil_div(dim, compression.block_size)
        read = rows * dim * element + pooling
        workspace = _blocks(table, blocks, lookups)
        return Work(lookups, rows * blocks * _HASH_OPS + adding, read, math.ceil(workspace))
    raise AssertionError(f"{table.compression} is not a compression that takes work of its own")


def _blocks(table: TableSpec, blocks: int, lookups: float) -> float:
    """Bytes of where the blocks lie, in three arrays, and of the gradients of rows that have several."""
    rows = distinct(table.num_embeddings, lookups)
    pieces = lookups if blocks == 1 else rows * blocks
    gradients = 0.0 if blocks == 1 else rows * table.embedding_dim * _FLOAT
    return 3 * _RECORD * pieces + gradients + _PAGES


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


def _products(table: TableSpec, train: TensorTrain, rows: float) -> float:
    """Elements held of the products of cores above so many rows, of what is sent back, and of gradients."""
    row_shape, dim_shape = table_shapes(table)
    last = len(dim_shape) - 1
    prefixes = [min(rows, float(math.prod(row_shape[: k + 1]))) for k in range(last + 1)]
    # Of the product at a prefix of k + 1 digits, and of the gradient that it is sent.
    ranks = [_LANES * ceil_div(rank, _LANES) for rank in train.ranks]
    sizes = [math.prod(dim_shape[: k + 1]) * ranks[k + 1] for k in range(last)]
    products = sum(sizes[k] * prefixes[k] for k in range(1, last))
    # A row's gradient gives way to what the row, and then a prefix of it, sends; or prefixes alone send:
    # ROWS_SEND in recemb_train.h, which depends on the machine where the last columns fill vectors.
    rows_send = rows * max(table.embedding_dim, *sizes)
    prefixes_send = rows * table.embedding_dim + prefixes[last - 1] * max(sizes[: max(last - 1, 1)])
    if math.prod(dim_shape[:-1]) < dim_shape[-1]:
        return products + rows_send
    return products + (prefixes_send if dim_shape[-1] % _LANES else max(rows_send, prefixes_send))


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
