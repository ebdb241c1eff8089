"""Row and dimension shapes of a tensor train with the fewest parameters.

A train stores sum_k c_k p_k weights with c_k = R_{k-1} q_k R_k, subject to prod(p) >= N. The continuous
optimum makes every c_k p_k equal, d (N prod(c))^(1/d) in all, and does not depend on how D is split into q.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from recemb.id_maps.radix import ceil_div, factorizations
from recemb.spec import TableSpec, TensorTrain


@lru_cache(maxsize=4096)
def tt_shapes(
    num_embeddings: int, embedding_dim: int, compression: TensorTrain
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(p, q) of a table: what the user fixed, and the fewest parameters for the rest.

    Dimension shapes are taken from the most even splits of D (2, 2, 4 for 16): the parameter count is the
    same for all up to rounding, and even splits give every bond columns on both sides. Ties go to fewer
    FLOPs a row.
    """
    ranks = compression.ranks
    if compression.dim_shape is not None:
        splits = [compression.dim_shape]
    else:
        every = factorizations(embedding_dim, compression.num_cores)
        evenest = min(sum(split) for split in every)
        splits = [split for split in every if sum(split) == evenest]

    def cost(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[int, int]:
        rows, dims = shapes
        return sum(map(math.prod, zip(rows, core_sizes(dims, ranks), strict=True))), flops_per_row(
            dims, ranks
        )

    return min(
        ((compression.row_shape or best_row_shape(num_embeddings, core_sizes(q, ranks)), q) for q in splits),
        key=cost,
    )


def table_shapes(table: TableSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(p, q) of a table whose compression is a :class:`TensorTrain`."""
    assert isinstance(table.compression, TensorTrain)
    return tt_shapes(table.num_embeddings, table.embedding_dim, table.compression)


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
    """The p >= 1 with prod(p) >= ``rows`` that minimises sum(costs * p); exact, by branch and bound."""
    return _search(rows, costs, math.inf)[1]


def _search(rows: int, costs: tuple[int, ...], budget: float) -> tuple[float, tuple[int, ...]]:
    """Cheapest (cost, p) below ``budget``; (inf, ()) when there is none."""
    if len(costs) == 1:
        only = costs[0] * rows
        return (only, (rows,)) if only < budget else (math.inf, ())
    if len(costs) == 2:
        return _search_two(rows, costs, budget)
    least: float = budget
    shape: tuple[int, ...] = ()
    middle = min(rows, max(1, round(_balanced(rows, costs) / costs[0])))
    # Outwards from the continuous optimum, each way until the convex lower bound passes the best so far.
    for step in (1, -1):
        first = middle if step == 1 else middle - 1
        while 1 <= first <= rows and _bound(rows, costs, first) < least:
            spent = costs[0] * first
            cost, rest = _search(ceil_div(rows, first), costs[1:], least - spent)
            if rest:
                least, shape = cost + spent, (first, *rest)
            first += step
    return (least, shape) if shape else (math.inf, ())


def _search_two(rows: int, costs: tuple[int, ...], budget: float) -> tuple[float, tuple[int, ...]]:
    left, right = costs
    middle = min(rows, max(1, round(math.sqrt(rows * right / left))))
    budget = min(budget, float(left * middle + right * ceil_div(rows, middle) + 1))
    # left * p + right * rows / p < budget holds between the roots of a quadratic in p.
    root = math.sqrt(max(0.0, budget * budget - 4.0 * left * right * rows))
    low = max(1, math.floor((budget - root) / (2 * left)))
    high = min(rows, math.ceil((budget + root) / (2 * left)))
    if high < low:
        return math.inf, ()
    first = np.arange(low, high + 1, dtype=np.int64)
    cost = left * first + right * -(-rows // first)
    at = int(cost.argmin())
    if cost[at] >= budget:
        return math.inf, ()
    return float(cost[at]), (int(first[at]), ceil_div(rows, int(first[at])))


def _balanced(rows: float, costs: Sequence[int]) -> float:
    """(rows * prod(costs))^(1/d): what every core costs at the continuous optimum."""
    return math.exp((math.log(rows) + sum(map(math.log, costs))) / len(costs))


def _bound(rows: int, costs: tuple[int, ...], first: int) -> float:
    """No p that starts with ``first`` costs less."""
    return costs[0] * first + (len(costs) - 1) * _balanced(max(1.0, rows / first), costs[1:]) * (1 - 1e-12)
