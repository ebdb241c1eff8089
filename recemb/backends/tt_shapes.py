"""Row and dimension shapes of a tensor train with the fewest parameters.

A train stores sum_k c_k p_k weights with c_k = R_{k-1} q_k R_k, subject to prod(p) >= N. The continuous
optimum makes every c_k p_k equal, d (N prod(c))^(1/d) in all, and does not depend on how D is split into q:
it is a train of one and the same tensor, whose modes have p_k q_k entries. A split chooses which of a mode's
entries are columns, and with that how much is computed for a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from recemb.errors import ConfigError
from recemb.id_maps.radix import ceil_div, factorizations
from recemb.spec import TableSpec, TensorTrain

# Searches of two cores before one of more is given up, some 20 s; 10 M rows take 150 of them.
_MOST_SEARCHES = 2**21
# Of so many first entries each is as long as one more search.
_ENTRIES_A_SEARCH = 64


@lru_cache(maxsize=4096)
def tt_shapes(
    num_embeddings: int, embedding_dim: int, compression: TensorTrain
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(p, q) of a table: what the user fixed, and the fewest parameters for the rest.

    Of D columns the first core takes q_1, the last one the others, those between none. Products of prefixes
    have q_1 columns then, as few as can be, where an even split (2, 2, 4 for 16) makes 4: they cost in
    proportion. q_1 is the least for which q_1 R >= D at every bond R: rows that share all digits after a bond
    span min(D, q_1 R) directions, those that share all before it min(D, R D / q_1), and neither may be fewer
    than D. Ranks for which no divisor q_1 of D has D / R <= q_1 <= R, below some sqrt(D), take the most even
    split, of several the one with the fewest parameters, then FLOPs a row; so do two cores, which multiply
    nothing before a row, and given row shapes, whose parameter count depends on the split.

    Raises:
        ConfigError: of so many rows and such ranks the best shape takes too long to find.
    """
    ranks = compression.ranks
    if compression.dim_shape is not None:
        splits = [compression.dim_shape]
    else:
        splits = _splits(embedding_dim, ranks, compression.row_shape is not None)

    def cost(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[int, int]:
        rows, dims = shapes
        return sum(map(math.prod, zip(rows, core_sizes(dims, ranks), strict=True))), flops_per_row(
            dims, ranks
        )

    return min(
        ((compression.row_shape or best_row_shape(num_embeddings, core_sizes(q, ranks)), q) for q in splits),
        key=cost,
    )


def _splits(dim: int, ranks: Sequence[int], rows_given: bool) -> list[tuple[int, ...]]:
    """The splits of D that :func:`tt_shapes` chooses from."""
    order, least = len(ranks) - 1, min(ranks[1:-1])
    first = min(q for q, _ in factorizations(dim, 2) if q * least >= dim)
    if order > 2 and first <= least and not rows_given:
        return [(first, *(1,) * (order - 2), dim // first)]
    every = factorizations(dim, order)
    evenest = min(sum(split) for split in every)
    return [split for split in every if sum(split) == evenest]


def table_shapes(table: TableSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(p, q) of a table whose compression is a :class:`TensorTrain`."""
    assert isinstance(table.compression, TensorTrain)
    try:
        return tt_shapes(table.num_embeddings, table.embedding_dim, table.compression)
    except ConfigError as error:
        raise ConfigError(f"table {table.name!r}: {error}") from None


def core_sizes(dim_shape: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """c_k = R_{k-1} q_k R_k, the width of one row of core k."""
    return tuple(ranks[k] * q * ranks[k + 1] for k, q in enumerate(dim_shape))


def flops_per_row(dim_shape: Sequence[int], ranks: Sequence[int]) -> int:
    """Multiply-adds, times two, to rebuild one row from left to right without sharing."""
    done, total = dim_shape[0], 0
    for k in range(1, len(dim_shape)):
        total += 2 * done * ranks[k] * dim_shape[k] * ranks[k + 1]
        done *= dim_shape[k]
    return total


@lru_cache(maxsize=65536)
def best_row_shape(rows: int, costs: tuple[int, ...]) -> tuple[int, ...]:
    """The p >= 1 with prod(p) >= ``rows`` that minimises sum(costs * p); exact, by branch and bound.

    Raises:
        ConfigError: that takes too long, as where the optimum is flat over millions of p_1.
    """
    try:
        return _search(rows, costs, math.inf, _Patience(_MOST_SEARCHES))[1]
    except TimeoutError:
        near = _rounded(rows, costs)
        raise ConfigError(
            f"the TensorTrain row_shape of fewest weights for num_embeddings={rows} and cores of {costs} "
            f"weights a row takes too long to find; give one, e.g. row_shape={near}, which is near it, or "
            "use a lower rank or fewer cores"
        ) from None


class _Patience:
    """Counts down."""

    def __init__(self, searches: int) -> None:
        self._left = searches

    def spend(self, searches: int) -> None:
        """Raise ``TimeoutError`` when it is at its end."""
        self._left -= searches
        if self._left < 0:
            raise TimeoutError


def _rounded(rows: int, costs: tuple[int, ...]) -> tuple[int, ...]:
    """The continuous optimum, core by core to the nearest whole number; holds ``rows``."""
    if len(costs) == 1:
        return (rows,)
    first = _start(_optimum(rows, costs)[0], rows, costs)
    return (first, *_rounded(ceil_div(rows, first), costs[1:]))


def _search(
    rows: int, costs: tuple[int, ...], budget: float, patience: _Patience
) -> tuple[float, tuple[int, ...]]:
    """Cheapest (cost, p) below ``budget``; (inf, ()) when there is none.

    Costs are ints, and so is every budget but the first, infinity: past 2**53 floats would mix up neighbours.
    """
    if len(costs) == 1:
        only = costs[0] * rows
        return (only, (rows,)) if only < budget else (math.inf, ())
    if len(costs) == 2:
        return _search_two(rows, costs, budget, patience)
    limit: float = budget
    shape: tuple[int, ...] = ()
    middle = _start(_optimum(rows, costs)[0], rows, costs)
    # Of equally good shapes the one nearest to this, larger ones first: saved tables have shapes so chosen.
    preferred = _start(math.exp((math.log(rows) + sum(map(math.log, costs))) / len(costs)), rows, costs)
    # Outwards from the continuous optimum, each way until the convex lower bound passes the best so far.
    for step in (1, -1):
        first = middle if step == 1 else middle - 1
        while 1 <= first <= rows and _bound(rows, costs, first) < limit:
            spent = costs[0] * first
            cost, rest = _search(ceil_div(rows, first), costs[1:], limit - spent, patience)
            if rest and (
                not shape or cost + spent < limit - 1 or _rank(first, preferred) < _rank(shape[0], preferred)
            ):
                limit, shape = cost + spent + 1, (first, *rest)
            first += step
    return (limit - 1, shape) if shape else (math.inf, ())


def _start(level: float, rows: int, costs: Sequence[int]) -> int:
    """The p_1 that costs nearest to ``level``."""
    return min(rows, max(1, round(level / costs[0])))


def _rank(first: int, preferred: int) -> tuple[bool, int]:
    """Orders equally good p_1: lower is better."""
    return first < preferred, abs(first - preferred)


def _search_two(
    rows: int, costs: tuple[int, ...], budget: float, patience: _Patience
) -> tuple[float, tuple[int, ...]]:
    left, right = costs
    middle = min(rows, max(1, math.isqrt(rows * right // left)))
    limit = left * middle + right * ceil_div(rows, middle) + 1
    if budget < limit:
        limit = int(budget)
    # left * p + right * rows / p < limit holds between the roots of a quadratic in p.
    root = math.isqrt(max(0, limit * limit - 4 * left * right * rows)) + 1
    low = max(1, (limit - root) // (2 * left))
    high = min(rows, ceil_div(limit + root, 2 * left))
    patience.spend(1 + max(0, high - low) // _ENTRIES_A_SEARCH)
    if high < low:
        return math.inf, ()
    largest = left * high + right * ceil_div(rows, low)
    # numpy's int64 wraps around without a word; Python's ints in an object array do not.
    first = np.arange(low, high + 1, dtype=np.int64 if largest < 2**63 else object)
    cost = left * first + right * -(-rows // first)
    at = int(cost.argmin())
    if cost[at] >= limit:
        return math.inf, ()
    return int(cost[at]), (int(first[at]), ceil_div(rows, int(first[at])))


def _optimum(rows: float, costs: Sequence[int]) -> tuple[float, float]:
    """(level, total) at the continuous optimum: a core of ``level`` or more has p = 1, the others cost that.

    Without p >= 1 the total is no use where ranks are high: a middle core takes p far below 1 there.
    """
    rising = sorted(costs)
    logs = math.log(rows) + sum(map(math.log, rising))
    above = 0
    while len(rising) > 1 and rising[-1] > math.exp(logs / len(rising)):
        above += rising[-1]
        logs -= math.log(rising.pop())
    level = math.exp(logs / len(rising))
    return level, above + len(rising) * level


def _bound(rows: int, costs: tuple[int, ...], first: int) -> float:
    """No p that starts with ``first`` costs less."""
    return costs[0] * first + _optimum(max(1.0, rows / first), costs[1:])[1] * (1 - 1e-12)
