"""Memory of a GPU that looking compressed tables up takes, forward and backward, above what is stored.

Counted as the Triton kernels allocate it (``kernels/recemb_kernels/triton_frame``). They size every array by
what the host knows: with L ids in a call of all tables, arrays of each family (tables of one op, equal
constants and one dtype) have L entries, whatever part of the ids is the family's; those of a train's nodes
above the rows as many as there are prefixes, if these are fewer. Plans are held from the forward to the
backward; what else a family needs is given back before the next one's turn.

A shape that recurs is captured as a CUDA graph, which keeps the memory of its step and copies of the batch
and of both sides' pooled rows. One such shape is counted, the training step's.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from recemb.backends import storages
from recemb.backends.tt_shapes import core_sizes, table_shapes
from recemb.id_maps.radix import ceil_div
from recemb.planner.work import Load, parameter_shapes
from recemb.spec import DTYPE_BYTES, ROBE, Dense, MixedDimension, QuotientRemainder, TableSpec, TensorTrain
from recemb_kernels.triton_frame import slice_rows, turn_rows
from recemb_kernels.tt_gather import TrainShape

_FLOAT = 4
_INT64 = 8
_INT32 = 4
# Rows of a tile of the products, positions of a piece of a row; the kernels' modules would import Triton.
_TILE_ROWS = 32
_PIECE = 64
# Of each id: its bag, the order and the row of the plan, and where the row's ids start; the row has a key.
_PLAN = 4 * _INT32
# cub sorts pairs from one pair of buffers to another, besides what goes in and comes out.
_SORT = 3 * _INT64
# Of each run of equal keys: its number, its key, and three starts.
_RUNS = _INT64 + 4 * _INT32
# Of each position: where its bag's gradient starts (in less than 2**31 elements), and its scale.
_PLACES = _INT32 + _FLOAT
# Of each row that is stepped: its table, its row and whether it is touched.
_ENTRIES = 2 * _INT64 + _INT32
# Arrays of a family that have a few rows more than the batch, whatever that has.
_FEW = 2**15
# Pooled rows [B, sum of D]: the graph's, its copy of their gradient, and that with a refused batch's out.
# What the caller is given, and gives back, is the model's: torchrec counts it among its outputs.
_POOLED = 3


@dataclass(frozen=True)
class _Rank:
    """What a family finds on a rank.

    Args:
        ids: L, of all tables.
        micro_batch_rows: distinct rows of a family at once.
        world: ranks over which tables are spread.
        weighted: whether ids have weights, and those gradients.
        key: bytes of a key, which tells all rows apart.
    """

    ids: float
    micro_batch_rows: int
    world: int
    weighted: bool
    key: int

    def share(self, sizes: Sequence[float]) -> float:
        """The most on a rank of sizes that are dealt out to the rank that has least."""
        return _share(sizes, self.world)


@dataclass(frozen=True)
class _Needs:
    """Bytes of one family: from its forward to its backward, and within either."""

    held: float
    forward: float
    backward: float


def gpu_workspace(loads: Sequence[Load], world: int, micro_batch_rows: int, *, weighted: bool = False) -> int:
    """Bytes that a rank needs to look the tables of one collection up, an upper bound.

    On one rank it counts all tables. On more, a rank is taken to have what it would if tables were dealt out
    by their ids, each to the rank with the fewest: their mean over the ranks and, but for its part of that,
    the largest table's. Plans that give a rank more ids than that need more.

    Args:
        loads: of the compressed tables.
        world: number of ranks.
        micro_batch_rows: distinct rows of a family that are computed at once.
        weighted: whether the bags carry per-sample weights.
    """
    if not loads:
        return 0
    streams = [*loads, *filter(None, map(_cached, loads))]
    ids = _share([load.ids for load in streams], world)
    # Trains have some rows more than their tables.
    key = _key(2 * sum(load.table.num_embeddings for load in streams))
    rank = _Rank(ids, micro_batch_rows, world, weighted, key)
    needs = [_family(own, rank) for own in _families(streams)]
    pooled = _share([load.bags * load.table.embedding_dim * _FLOAT for load in streams], world)
    batch = ids * (_INT64 + (2 * _FLOAT if weighted else 0)) + _INT64 * _share(
        [x.bags for x in streams], world
    )
    within = max(_sorting(key) * ids, *(max(need.forward, need.backward) for need in needs))
    held = (_PLAN + key) * ids + batch + sum(need.held for need in needs) + _FEW * len(needs)
    return math.ceil(held + _POOLED * pooled + within)


def _key(most: float) -> int:
    """Bytes of each of so many keys: 32 bits where they will do."""
    return _INT32 if most < 2**31 else _INT64


def _sorting(key: int) -> int:
    """Of each key that is sorted: it and its place as they come in, go out and move; the place, narrowed."""
    return 3 * key + 2 * _INT64 + _INT32


def _share(sizes: Sequence[float], world: int) -> float:
    return sum(sizes) / world + (1 - 1 / world) * max(sizes)


def _cached(load: Load) -> Load | None:
    """The stream of a table's cached rows: as many ids again, as the host does not know how many are hits."""
    if not load.table.cache_rows:
        return None
    plain = replace(load.table, num_embeddings=load.table.cache_rows, compression=Dense())
    return replace(load, table=plain)


def _families(loads: Sequence[Load]) -> list[list[Load]]:
    families: dict[Hashable, list[Load]] = {}
    for load in loads:
        families.setdefault(_constants(load.table), []).append(load)
    return list(families.values())


def _constants(table: TableSpec) -> Hashable:
    """What tables of one family have in common."""
    compression, dim = table.compression, table.embedding_dim
    own: tuple[Hashable, ...] = ()
    if isinstance(compression, TensorTrain):
        own = table_shapes(table)[1], compression.ranks
    elif isinstance(compression, QuotientRemainder):
        own = dim, compression.operation
    elif isinstance(compression, MixedDimension):
        own = dim, compression.dim
    elif isinstance(compression, ROBE):
        own = dim, compression.block_size, compression.use_sign
    else:
        own = (dim,)
    return compression.method, table.dtype, own


def _family(loads: Sequence[Load], rank: _Rank) -> _Needs:
    compression = loads[0].table.compression
    if isinstance(compression, TensorTrain):
        return _trains([load.table for load in loads], compression, rank)
    if isinstance(compression, QuotientRemainder):
        return _pairs([load.table for load in loads], rank)
    if isinstance(compression, MixedDimension):
        return _projected(loads, compression, rank)
    if isinstance(compression, ROBE):
        return _blocks([load.table for load in loads], compression, rank)
    return _Needs(0, _INT64 * rank.ids, _row_gradients(rank, loads[0].table.embedding_dim, _stepped(rank)))


def _projected(loads: Sequence[Load], compression: MixedDimension, rank: _Rank) -> _Needs:
    dim, element = compression.dim, DTYPE_BYTES[loads[0].table.dtype]
    bags = rank.share([load.bags for load in loads]) * dim * _FLOAT
    # Projections side by side, as stored and in float32; gradients of all, and beside them of a run's.
    one = rank.share([dim * load.table.embedding_dim for load in loads])
    beside = one * (_FLOAT + (element if element < _FLOAT else 0))
    rows = _row_gradients(rank, dim, _stepped(rank))
    return _Needs(bags, beside, bags + one * _FLOAT + max(beside, one * _FLOAT, rows))


def _row_gradients(rank: _Rank, dim: int, then: float) -> float:
    """Gradients of distinct rows [L, D], with those of long rows' pieces as long as they are summed.

    Args:
        then: bytes that are needed when the pieces are done with.
    """
    rows = rank.ids * dim * _FLOAT
    return rows + max(_pieces(rank, dim) + rank.ids * _PLACES, then)


def _pieces(rank: _Rank, dim: int) -> float:
    """Sums of the pieces that rows with many positions are cut into."""
    return (rank.ids / _PIECE + 1) * dim * _FLOAT


def _stepped(rank: _Rank) -> float:
    """Rows located for the step, and which of them take part in it where tables differ."""
    return rank.ids * (_ENTRIES + _INT64 + _INT32)


def _trains(tables: Sequence[TableSpec], train: TensorTrain, rank: _Rank) -> _Needs:
    dim, element, ids = tables[0].embedding_dim, DTYPE_BYTES[tables[0].dtype], rank.ids
    shapes = [table_shapes(table) for table in tables]
    rows, dims, ranks = [p for p, _ in shapes], shapes[0][1], train.ranks
    order, widths = len(dims), core_sizes(dims, ranks)
    columns = [math.prod(dims[:k]) for k in range(order)]
    slices = [rank.share([p[k] for p in rows]) for k in range(order)]
    count, stored = math.ceil(ids), TrainShape(rows[0], dims, ranks).stores_shares
    micro = slice_rows(count, rank.micro_batch_rows)
    micro_batches = max(1, math.ceil(ids / micro))
    whole, capacity = micro_batches == 1, min(ids, float(micro))
    prefixes = [float(sum(math.prod(p[: k + 1]) for p in rows)) for k in range(order - 1)]
    # Of a batch, and of a micro-batch; one that begins within a prefix makes a node more of it.
    every = [*(min(ids, most + micro_batches - 1) for most in prefixes), ids]
    nodes = [*(min(capacity, most) for most in prefixes), capacity]

    # Of each node, by level: its parent and first child, its place in the order by slice, and tiles of that;
    # slices of the first level, and of rows whose shares are not stored.
    levels = _INT32 * (every[0] + (0 if stored else ids) + 2 * sum(every[1:]) + sum(every[:-1]))
    levels += _INT32 * sum(
        n * (1 + width / _TILE_ROWS) for n, width in zip(every[1:], columns[1:], strict=True)
    )
    groups = 3 * _INT64 * micro_batches * sum(slices[1:])
    # Those of the first level are there for all micro-batches.
    first = every[0] * ranks[1] * columns[1]
    products = (first + sum(nodes[k] * columns[k + 1] * ranks[k + 1] for k in range(1, order - 1))) * element
    # Bags take rows in turns, but for the gradients of weights.
    turn = ids if rank.weighted else min(ids, float(max(turn_rows(count), micro)))
    pooled = turn * dim * _FLOAT
    # Digits, whether they open a node, and keys of the groups; rows are sorted last.
    key, digits = _key(micro_batches * max(slices)), _INT32 * order + order - 1
    planning = key * sum(every[1:]) + ids * max(digits, _sorting(key))

    # On the way back: the gradients of a micro-batch's rows, with long rows' pieces; those of the nodes
    # above, which all micro-batches share in the first level; and by level each child's share of its parent's
    # gradient, and that.
    own, width = capacity * dim * _FLOAT, columns[-1] * ranks[order - 1] * _FLOAT
    above = [0.0, *(nodes[k - 1] * columns[k] * ranks[k] * _FLOAT for k in range(2, order))]
    shares = [nodes[k] * columns[k] * ranks[k] * _FLOAT for k in range(1, order - 1)]
    # Nodes with many rows are summed in pieces.
    sums = (capacity / _PIECE + 1) * width
    gathered = own + _pieces(rank, dim)
    # The parents' products are given back before their gradients are made, but where those of one tree are
    # there for several micro-batches. A rank may have such a tree though that of all tables has parts.
    parents, back = (0.0, 0.0) if whole else (above[-1] * element / _FLOAT, products)
    if not whole and (rank.world > 1 or prefixes[-1] <= micro):
        then = capacity * width + max(own, sums) if stored else own + sums
        steps = [parents + above[-1] + max(gathered, then)]
    else:
        then = capacity * width + max(own, above[-1] + sums) if stored else own + above[-1] + sums
        steps = [max(parents + gathered, then)]
    steps += [above[k] + shares[k - 1] + above[k - 1] for k in range(1, order - 1)]
    gradients = sum(share * width for share, width in zip(slices, widths, strict=True)) * _FLOAT
    back += first * _FLOAT + max(steps) - parents
    return _Needs(
        held=levels + groups + (products if whole else 0) + (pooled if rank.weighted else 0),
        forward=max(planning, pooled + (0 if whole else products)),
        backward=ids * _PLACES + gradients + back,
    )


def _pairs(tables: Sequence[TableSpec], rank: _Rank) -> _Needs:
    ids, dim = rank.ids, tables[0].embedding_dim
    shapes = [list(parameter_shapes([table]).values())[:2] for table in tables]
    sides = 0.0
    for which in (0, 1):
        # Runs are summed by pieces, and those once more.
        rows = min(ids, sum(shape[which][0] for shape in shapes) + 1.0)
        sums = min(ids, rows + ids / _PIECE) + rows
        sides += sums * shapes[0][which][1] * _FLOAT + ids * _ENTRIES
    split = 4 * _INT64 * ids
    weighing = ids * dim * _FLOAT if rank.weighted else 0.0
    # By remainder rows are sorted once more.
    then = sides + ids * (_RUNS + _SORT + 2 * _INT64)
    return _Needs(0, 0, split + weighing + _row_gradients(rank, dim, then))


def _blocks(tables: Sequence[TableSpec], robe: ROBE, rank: _Rank) -> _Needs:
    dim, size = tables[0].embedding_dim, robe.block_size
    blocks = rank.ids * ceil_div(dim, size)
    arrays = [parameter_shapes(peers)["array"][0] for _, peers in storages(tables)]
    rows = min(blocks, float(sum(arrays)))
    pieces = min(blocks, rows + blocks / _PIECE)
    # Starts and signs; sorted with their order, the row each starts in, and what reaches beyond it.
    placed = blocks * (_INT64 + 1)
    then = blocks * (_SORT + 3 * _INT64 + _RUNS + 2 * _INT64)
    # Of an array row: pieces and sums two rows wide, its gradient and that of the next, and where they go.
    then += 2 * size * _FLOAT * (pieces + 2 * rows) + 2 * rows * (4 * _INT64 + _INT32)
    weighing = rank.ids * dim * _FLOAT if rank.weighted else 0.0
    return _Needs(0, 0, placed + weighing + _row_gradients(rank, dim, then))
