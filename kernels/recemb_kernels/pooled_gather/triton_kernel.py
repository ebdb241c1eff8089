"""Triton kernels of rows made of a quotient's and a remainder's part; stored rows need only the frame's.

A key k of a table with radix c is row k // c of its left parameter [., LEFT] combined with row k mod c of its
right one [c, RIGHT]; a row before pooling has W columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recemb_kernels.triton_frame.kernels import upper_bound

MULT, ADD, CONCAT = (tl.constexpr(operation) for operation in (1, 2, 3))


@triton.jit
def combine(
    left,
    right,
    quotient,
    remainder,
    stored,
    d,
    OPERATION: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
):
    """[B, BD] float32: columns ``d`` of rows; ``left`` and ``right`` point at parameters, one or [B, 1]."""
    mask = stored[:, None] & (d < LEFT)[None, :]
    a = tl.load(left + quotient[:, None] * LEFT + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if OPERATION == CONCAT:
        mask = stored[:, None] & ((d >= LEFT) & (d < LEFT + RIGHT))[None, :]
        b = tl.load(right + remainder[:, None] * RIGHT + (d - LEFT)[None, :], mask=mask, other=0.0)
        return a + b.to(tl.float32)
    b = tl.load(right + remainder[:, None] * RIGHT + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if OPERATION == MULT:
        return a * b
    return a + b


@triton.jit
def pool_pairs(
    out,
    lefts,
    rights,
    ids,
    weights,
    offsets,
    features,
    pairs,
    batch_size,
    columns,
    OPERATION: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    W: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ELEMENT: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
):
    """out[b, columns of f] = sum or mean over bag (f, b) of w * row(id).

    Grid (bags of one feature / BB, features, W / BD). ``lefts`` and ``rights`` [F] are addresses, ``features``
    [F, 3] the number in the batch, first column and whether averaged, ``pairs`` [F, 3] the key base, the ids
    that the feature has, and c.
    """
    f = tl.program_id(1)
    bags = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    d = tl.program_id(2) * BD + tl.arange(0, BD)
    feature = tl.load(features + 3 * f)
    column = tl.load(features + 3 * f + 1)
    mean = tl.load(features + 3 * f + 2)
    key_base = tl.load(pairs + 3 * f)
    high = tl.load(pairs + 3 * f + 1)
    radix = tl.load(pairs + 3 * f + 2)
    left = tl.multiple_of(tl.load(lefts + f).to(tl.pointer_type(ELEMENT)), 16)
    right = tl.multiple_of(tl.load(rights + f).to(tl.pointer_type(ELEMENT)), 16)
    here = bags < batch_size
    first = tl.load(offsets + feature * batch_size + bags, mask=here, other=0)
    length = tl.load(offsets + feature * batch_size + bags + 1, mask=here, other=0) - first
    total = tl.zeros((BB, BD), dtype=tl.float32)
    for i in range(tl.max(length, 0)):
        at = first + i
        row = tl.load(ids + at, mask=i < length, other=-1)
        stored = (row >= 0) & (row < high)
        key = tl.where(stored, row + key_base, 0)
        value = combine(left, right, key // radix, key % radix, stored, d, OPERATION, LEFT, RIGHT)
        if WEIGHTED:
            value *= tl.load(weights + at, mask=stored, other=0.0)[:, None]
        total += value
    if mean != 0:
        count = tl.maximum(length, 1).to(tl.float32)
        total = tl.div_rn(total, tl.zeros_like(total) + count[:, None])
    mask = here[:, None] & (d < W)[None, :]
    tl.store(out + bags[:, None] * columns + column + d[None, :], total, mask=mask)


@triton.jit
def split_rows(
    table,
    quotient,
    remainder,
    left_key,
    right_key,
    row_key,
    cuts,
    first_key,
    table_keys,
    radices,
    left_keys,
    right_keys,
    num_tables,
    count,
    STEPS: tl.constexpr,
    BR: tl.constexpr,
):
    """Each distinct row's table, quotient and remainder, and their keys among those of all tables.

    ``left_keys`` and ``right_keys`` [tables + 1] number the rows of either parameter. Rows of other families
    have the left keys -1 before this one's and the largest after, so that left keys rise; and the largest
    right key. Grid (count / BR).
    """
    u = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    here = u < count
    low = tl.load(cuts)
    inside = here & (u >= low) & (u < tl.load(cuts + 1))
    key = tl.load(row_key + u, mask=inside, other=0) - tl.where(inside, tl.load(first_key), 0)
    t = upper_bound(table_keys, num_tables, key, STEPS) - 1
    key -= tl.load(table_keys + t)
    radix = tl.load(radices + t)
    q = key // radix
    r = key % radix
    tl.store(table + u, t, mask=here)
    tl.store(quotient + u, q, mask=here)
    tl.store(remainder + u, r, mask=here)
    outside = tl.where(u < low, -1, tl.load(left_keys + num_tables))
    tl.store(left_key + u, tl.where(inside, tl.load(left_keys + t) + q, outside), mask=here)
    outside = tl.load(right_keys + num_tables)
    tl.store(right_key + u, tl.where(inside, tl.load(right_keys + t) + r, outside), mask=here)


@triton.jit
def pair_rows(
    out,
    lefts,
    rights,
    table,
    quotient,
    remainder,
    cuts,
    OPERATION: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    W: tl.constexpr,
    ELEMENT: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """out[u] [W] = the distinct rows u from ``cuts[0]`` to ``cuts[1]``. Grid (rows / BR, W / BD)."""
    u = tl.load(cuts) + tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    inside = u < tl.load(cuts + 1)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    t = tl.load(table + u, mask=inside, other=0)
    left = tl.load(lefts + t).to(tl.pointer_type(ELEMENT))
    right = tl.load(rights + t).to(tl.pointer_type(ELEMENT))
    q = tl.load(quotient + u, mask=inside, other=0)
    r = tl.load(remainder + u, mask=inside, other=0)
    value = combine(left[:, None], right[:, None], q, r, inside, d, OPERATION, LEFT, RIGHT)
    tl.store(out + u[:, None] * W + d[None, :], value, mask=inside[:, None] & (d < W)[None, :])


@triton.jit
def sum_sides(
    out,
    grad_rows,
    order,
    piece_first,
    run_piece,
    cuts,
    table,
    others,
    other_row,
    ORDERED: tl.constexpr,
    FACTOR: tl.constexpr,
    W: tl.constexpr,
    FROM: tl.constexpr,
    WIDTH: tl.constexpr,
    ELEMENT: tl.constexpr,
    BP: tl.constexpr,
    BD: tl.constexpr,
):
    """out[p] [WIDTH] = sum over the distinct rows of piece p of columns FROM on of ``grad_rows`` [., W].

    The places of a piece are rows themselves, or places in ``order`` if ORDERED. With FACTOR each is
    multiplied by row ``other_row`` of the other parameter, whose addresses are ``others``. Grid (pieces / BP,
    WIDTH / BD).
    """
    low = tl.load(run_piece + tl.load(cuts))
    high = tl.load(run_piece + tl.load(cuts + 1))
    piece = low + tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    if low + tl.program_id(0).to(tl.int64) * BP >= high:
        return
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    here = piece < high
    first = tl.load(piece_first + piece, mask=here, other=0)
    length = tl.load(piece_first + piece + 1, mask=here, other=0) - first
    total = tl.zeros((BP, BD), dtype=tl.float32)
    for i in range(tl.max(length, 0)):
        inside = i < length
        u = first + i
        if ORDERED:
            u = tl.load(order + u, mask=inside, other=0)
        mask = inside[:, None] & (d < WIDTH)[None, :]
        value = tl.load(grad_rows + u[:, None] * W + FROM + d[None, :], mask=mask, other=0.0)
        if FACTOR:
            other = tl.load(others + tl.load(table + u, mask=inside, other=0)).to(tl.pointer_type(ELEMENT))
            row = tl.load(other_row + u, mask=inside, other=0)
            factor = tl.load(other[:, None] + row[:, None] * WIDTH + d[None, :], mask=mask, other=0.0)
            value *= factor.to(tl.float32)
        total += value
    mask = here[:, None] & (d < WIDTH)[None, :]
    tl.store(out + piece[:, None] * WIDTH + d[None, :], total, mask=mask)
