"""Memory that looking compressed tables up takes on a CPU, forward and backward, above what is stored.

Counted as the kernels hold it (``kernels/recemb_kernels``), for uniform ids, which meet the most rows, and
rows of bags that hold several. A table keeps some of it until its backward; the rest all tables of a
collection take in turn, or each thread has of its own where it takes whole tables, or parts of one. Plans,
which sort and group the ids, are not counted: up to 200 bytes an id.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from recemb.backends import storages
from recemb.backends.tt_shapes import table_shapes
from recemb.id_maps.radix import ceil_div
from recemb.planner.work import Load, distinct
from recemb.spec import ROBE, MixedDimension, QuotientRemainder, TableSpec, TensorTrain

_FLOAT = 4
_LINE = 64
_HUGE_PAGE = 2**21
# Ranks are padded to whole vectors of these.
_LANES = 8
# A block's start and what it belongs to; in arrays of 2**32 weights and more it takes twice as much.
_RECORD = 8
# The arrays of these begin at different places of different pages.
_PAGES = 4 * 5000
# Rows of a quotient-remainder table that send to a remainder are added up so many at a time.
_PIECE = 64
# Bags of one partial sum of a projection's gradient.
_CHUNK = 256
# Rows of a part of a train that a thread may take alone, parts of a table, and how much larger than others
# one may be: ``digit_tree/parts.cpp``.
_PART_ROWS, _MOST_PARTS, _UNEVEN = 2**13, 8, 1.15
# Ids of a table up to which a thread may take it whole; there are two such tables a thread, or more.
_MOST_IDS = 2**14


@dataclass(frozen=True)
class _Held:
    """Bytes of one storage: held until its backward, and only while its turn lasts.

    Of a train in slices, ``spare`` has the products of one. Where those of all such trains find ``room``, its
    ``products`` are held until its backward, and its turn takes so much ``less``.
    """

    kept: float
    spare: float
    less: float = 0.0
    products: float = 0.0
    room: float = 0.0


def cpu_workspace(loads: Sequence[Load], others: int, micro_batch_rows: int, *, weighted: bool) -> int:
    """Bytes of the tables of one collection, the most that there can be for any number of threads.

    Args:
        loads: its compressed tables, and what is looked up in them.
        others: its tables that are not compressed.
        micro_batch_rows: distinct rows of a train whose products are held at once.
        weighted: whether ids have weights.
    """
    held = {load.table.name: _held(load, micro_batch_rows, weighted) for load in loads}
    # Tables of one ROBE array have their turn together.
    turns = [[held[table.name] for table in peers] for _, peers in storages(load.table for load in loads)]
    whole = all(load.ids <= _MOST_IDS for load in loads)
    takers = max(1, (len(turns) + others) // 2) if whole else 1
    kept = sum(table.kept + _LINE for table in held.values())
    sliced = [table for table in held.values() if table.room]
    products = [min(table.products, table.room / len(sliced)) for table in sliced]
    most = 0
    # All trains in slices keep their products, or one of them does not.
    for keeps, without in (1, 0.0), (0, min(products, default=0.0)):
        taken = (sum(table.spare - keeps * table.less + _LINE for table in turn) for turn in turns)
        most = max(most, _grown(kept + sum(products) - without) + _grown(takers * max(taken, default=0.0)))
    return most


def _grown(asked: float) -> int:
    """What a buffer that grows takes: a quarter more than is asked for, and whole lines or huge pages."""
    unit = _HUGE_PAGE if asked >= _HUGE_PAGE else _LINE
    return unit * ceil_div(math.ceil(1.25 * asked), unit)


def _held(load: Load, micro_batch_rows: int, weighted: bool) -> _Held:
    table, compression, dim = load.table, load.table.compression, load.table.embedding_dim
    rows = _most_distinct(table, load.ids)
    if isinstance(compression, TensorTrain):
        return _train(table, compression, rows, micro_batch_rows, weighted)
    if isinstance(compression, QuotientRemainder):
        pieces = rows / _PIECE + min(rows, compression.collisions)
        return _Held(0, (rows + pieces) * dim * _FLOAT)
    if isinstance(compression, MixedDimension):
        narrow = load.bags * compression.dim * _FLOAT
        partial_sums = ceil_div(math.ceil(load.bags), _CHUNK) * compression.dim * dim * _FLOAT
        return _Held(narrow, narrow + partial_sums)
    if isinstance(compression, ROBE):
        blocks = ceil_div(dim, compression.block_size)
        pieces = load.ids if blocks == 1 else rows * blocks
        gradients = 0.0 if blocks == 1 else rows * dim * _FLOAT
        return _Held(0, 3 * _RECORD * pieces + gradients + _PAGES)
    raise AssertionError(f"{compression} is not a compression that has a workspace")


def _most_distinct(table: TableSpec, ids: float) -> float:
    """Distinct rows of uniform ids, three standard deviations above the mean: hardly a batch has more."""
    mean = distinct(table.num_embeddings, ids)
    return min(ids, float(table.num_embeddings), mean + 3 * math.sqrt(max(ids - mean, 0.0)) + 1)


def _train(
    table: TableSpec, train: TensorTrain, distinct_rows: float, micro_batch_rows: int, weighted: bool
) -> _Held:
    """Products of cores above the rows, kept where one slice holds all of these; what is sent back; rows."""
    micro = float(micro_batch_rows)
    # Of one first digit, or last one where the train is read from there: it is never cut.
    row_shape, _ = table_shapes(table)
    fewest = distinct_rows / min(row_shape[0], row_shape[-1])
    subtree = min(distinct_rows, fewest + 3 * math.sqrt(fewest) + 1)
    whole = _slices(table, train, distinct_rows, max(micro, subtree), weighted, 1)
    if distinct_rows > max(micro, subtree):
        products, room = _kept_products(table, train, distinct_rows, micro)
        whole = replace(whole, products=products, room=room)
    if distinct_rows < 2 * _PART_ROWS or not max(_PART_ROWS, subtree) <= micro < distinct_rows:
        return whole
    # Where its ids let it be cut into parts about alike.
    parts = 2
    while parts < _MOST_PARTS and 2 * parts * _PART_ROWS <= distinct_rows:
        parts *= 2
    most = min(max(micro / 2, subtree), _UNEVEN * distinct_rows / parts)
    cut = _slices(table, train, distinct_rows, most, weighted, parts)
    spare, kept = max(whole.spare, cut.spare), max(whole.kept, cut.kept)
    rest = max(whole.spare - whole.less, cut.spare - cut.less)
    return replace(whole, kept=kept, spare=spare, less=spare - rest)


def _slices(
    table: TableSpec,
    train: TensorTrain,
    distinct_rows: float,
    most: float,
    weighted: bool,
    parts: int,
) -> _Held:
    """The same in slices of ``most`` rows and so many parts, each of which a thread takes alone."""
    rows, dim = min(distinct_rows, most), table.embedding_dim
    row_shape, dim_shape = table_shapes(table)
    last = len(dim_shape) - 1
    ranks = _padded(train)
    prefixes, sizes = _prefixes(row_shape, dim_shape, ranks, rows)
    products = sum(size * count for size, count in zip(sizes[1:], prefixes[1:], strict=True))
    # A row's gradient gives way to what the row, and then a prefix of it, sends; or prefixes alone send:
    # ROWS_SEND in recemb_train.h, which depends on the machine where the last columns fill vectors.
    rows_send = rows * max(dim, *sizes)
    prefixes_send = rows * dim + prefixes[last - 1] * max(sizes[: max(last - 1, 1)])
    if math.prod(dim_shape[:-1]) < dim_shape[-1]:
        sent = rows_send
    else:
        sent = prefixes_send if dim_shape[-1] % _LANES else max(rows_send, prefixes_send)
    # As they are multiplied: copied where ranks are padded, or a train of several is read from its other end.
    widths = [1, *ranks[1:-1], 1]
    slices = [
        min(distinct_rows, float(row_shape[k])) * widths[k] * dim_shape[k] * widths[k + 1]
        for k in range(last + 1)
    ]
    copied = [slices[k] for k in range(last) if last > 1 or train.ranks[k + 1] % _LANES]
    kept, less = products + sum(copied), 0.0
    if parts > 1 or distinct_rows > most:
        # They add their gradients up over the batch, or a part; a number says of each whether it has begun.
        touched = sum(min(distinct_rows, float(count)) for count in row_shape[1:])
        sent = parts * (sent + sum(slices[1:]) + touched)
        kept, less = kept - products, parts * products
    # The batch's rows, whole, where bags hold several: until the backward where these are weighted.
    listed = distinct_rows * dim
    kept, spare = (kept + listed, less + sent) if weighted else (kept, less + max(sent, listed))
    return _Held(kept * _FLOAT, spare * _FLOAT, less * _FLOAT)


def _padded(train: TensorTrain) -> list[int]:
    """Its ranks, in whole vectors."""
    return [_LANES * ceil_div(rank, _LANES) for rank in train.ranks]


def _prefixes(
    row_shape: Sequence[int], dim_shape: Sequence[int], ranks: Sequence[int], rows: float
) -> tuple[list[float], list[int]]:
    """How many prefixes of 1 .. d - 1 digits so many rows have at most, and numbers in a product at one."""
    above = range(1, len(dim_shape))
    prefixes = [min(rows, float(math.prod(row_shape[:k]))) for k in above]
    return prefixes, [math.prod(dim_shape[:k]) * ranks[k] for k in above]


def _kept_products(
    table: TableSpec, train: TensorTrain, distinct_rows: float, micro: float
) -> tuple[float, float]:
    """Bytes of all products of a train in slices, and of those that it may keep, read from either end."""
    row_shape, dim_shape = table_shapes(table)
    all_products = room = 0.0
    for step in (1, -1):
        dims = dim_shape[::step]
        prefixes, sizes = _prefixes(row_shape[::step], dims, _padded(train)[::step], distinct_rows)
        products = sum(size * count for size, count in zip(sizes[1:], prefixes[1:], strict=True))
        all_products = max(all_products, products)
        sends = math.prod(dims[:-1]) < dims[-1] or (step == 1 and dims[-1] % _LANES == 0)
        sent = max(table.embedding_dim, *sizes) if sends else table.embedding_dim
        room = max(room, 1.5 * micro * sent)
    return all_products * _FLOAT, room * _FLOAT
