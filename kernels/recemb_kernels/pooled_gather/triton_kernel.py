"""Triton kernels of rows made of a quotient's and a remainder's part; stored rows need only the frame's.

A key k of a table with radix c is row k // c of its left parameter [., LEFT] combined with row k mod c of its
right one [c, RIGHT]; a row before pooling has W columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recemb_kernels.triton_frame.elements import launched
from recemb_kernels.triton_frame.kernels import pieces_of, span_of, upper_bound

MULT, ADD, CONCAT = (tl.constexpr(operation) for operation in (1, 2, 3))


@triton.jit
def divide(key, radix, reciprocal):
    """Quotient and remainder of 0 <= key < 2**62, by floor(2**62 / radix): at most one too small."""
    q = tl.umulhi(key.to(tl.uint64) << 2, reciprocal.to(tl.uint64)).to(tl.int64)
    more = (key - q * radix >= radix).to(tl.int64)
    return q + more, key - (q + more) * radix


@triton.jit
def combine(
    left,
    right,
    stored,
    d,
    OPERATION: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
):
    """[B, BD] float32: columns ``d`` of the rows made of those at ``left`` and ``right`` [B]."""
    mask = stored[:, None] & (d < LEFT)[None, :]
    a = tl.load(left[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if OPERATION == CONCAT:
        mask = stored[:, None] & ((d >= LEFT) & (d < LEFT + RIGHT))[None, :]
        b = tl.load(right[:, None] + (d - LEFT)[None, :], mask=mask, other=0.0)
        return a + b.to(tl.float32)
    b = tl.load(right[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if OPERATION == MULT:
        return a * b
    return a + b


@launched
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
    num_ids,
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

    Grid (bags of one feature / BB, features, W / BD). ``lefts`` and ``rights`` [F] are addresses;
    ``features`` [F, 3] the number in the batch, first column and whether averaged; ``pairs`` [F, 4] the key
    base, the ids that the feature has, c, and floor(2**62 / c).
    """
    f = tl.program_id(1)
    bags = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    d = tl.program_id(2) * BD + tl.arange(0, BD)
    feature = tl.load(features + 3 * f)
    column = tl.load(features + 3 * f + 1)
    mean = tl.load(features + 3 * f + 2)
    key_base = tl.load(pairs + 4 * f)
    high = tl.load(pairs + 4 * f + 1)
    radix = tl.load(pairs + 4 * f + 2)
    reciprocal = tl.load(pairs + 4 * f + 3)
    left = tl.multiple_of(tl.load(lefts + f).to(tl.pointer_type(ELEMENT)), 16)
    right = tl.multiple_of(tl.load(rights + f).to(tl.pointer_type(ELEMENT)), 16)
    here = bags < batch_size
    first, length = span_of(offsets, feature * batch_size + bags, here, num_ids)
    total = tl.zeros((BB, BD), dtype=tl.float32)
    for i in range(tl.max(length, 0)):
        at = first + i
        row = tl.load(ids + at, mask=i < length, other=-1)
        stored = (row >= 0) & (row < high)
        q, r = divide(row + key_base, radix, reciprocal)
        value = combine(left + q * LEFT, right + r * RIGHT, stored, d, OPERATION, LEFT, RIGHT)
        if WEIGHTED:
            value *= tl.load(weights + at, mask=stored, other=0.0)[:, None]
        total += value
    if mean != 0:
        count = tl.maximum(length, 1).to(tl.float32)
        total = tl.div_rn(total, tl.zeros_like(total) + count[:, None])
    mask = here[:, None] & (d < W)[None, :]
    tl.store(out + bags[:, None] * columns + column + d[None, :], total, mask=mask)


@launched
def split_rows(
    left,
    right,
    left_key,
    right_key,
    row_key,
    cuts,
    first_key,
    table_keys,
    radices,
    left_keys,
    right_keys,
    lefts,
    rights,
    num_tables,
    count,
    LEFT_BYTES: tl.constexpr,
    RIGHT_BYTES: tl.constexpr,
    STEPS: tl.constexpr,
    BR: tl.constexpr,
):
    """The addresses of each distinct row's two parts, and their keys among those of all tables.

    ``radices`` [tables, 2]: c and floor(2**62 / c). ``left_keys`` and ``right_keys`` [tables + 1] number the
    rows of either parameter. Rows of other families have the left keys -1 before this one's and the largest
    after, so that left keys rise; and the largest right key. Grid (count / BR).
    """
    u = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    here = u < count
    low = tl.load(cuts)
    inside = here & (u >= low) & (u < tl.load(cuts + 1))
    base = tl.load(first_key)
    key = tl.load(row_key + u, mask=inside, other=base) - base
    t = upper_bound(table_keys, num_tables, key, STEPS) - 1
    key -= tl.load(table_keys + t)
    q, r = divide(key, tl.load(radices + 2 * t), tl.load(radices + 2 * t + 1))
    tl.store(left + u, tl.load(lefts + t) + q * LEFT_BYTES, mask=here)
    tl.store(right + u, tl.load(rights + t) + r * RIGHT_BYTES, mask=here)
    outside = tl.where(u < low, -1, tl.load(left_keys + num_tables))
    tl.store(left_key + u, tl.where(inside, tl.load(left_keys + t) + q, outside), mask=here)
    outside = tl.load(right_keys + num_tables)
    tl.store(right_key + u, tl.where(inside, tl.load(right_keys + t) + r, outside), mask=here)


@launched
def pair_rows(
    out,
    lefts,
    rights,
    cuts,
    OPERATION: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    W: tl.constexpr,
    ELEMENT: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """out[u] [W] = the distinct rows u from ``cuts[0]`` to ``cuts[1]``. Grid (rows / BR, W / BD).

    ``lefts`` and ``rights`` [L] are the addresses of their parts.
    """
    u = tl.load(cuts) + tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    inside = u < tl.load(cuts + 1)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    left = tl.load(lefts + u, mask=inside, other=0).to(tl.pointer_type(ELEMENT))
    right = tl.load(rights + u, mask=inside, other=0).to(tl.pointer_type(ELEMENT))
    value = combine(left, right, inside, d, OPERATION, LEFT, RIGHT)
    tl.store(out + u[:, None] * W + d[None, :], value, mask=inside[:, None] & (d < W)[None, :])


@launched
def sum_sides(
    out,
    grad_rows,
    order,
    piece_first,
    run_piece,
    cuts,
    others,
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
    multiplied by its part of the other parameter, at address ``others``. Grid (pieces / BP, WIDTH / BD).
    """
    piece, here, first, length = pieces_of(run_piece, piece_first, cuts, BP)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros((BP, BD), dtype=tl.float32)
    for i in range(tl.max(length, 0)):
        u = tl.where(i < length, first + i, -1)
        if ORDERED:
            u = tl.load(order + u, mask=u >= 0, other=-1)
        # A mask of its own for each use: one for several has broken Triton 3.7's choice of layouts.
        mask = (u >= 0)[:, None] & (d < WIDTH)[None, :]
        value = tl.load(grad_rows + u[:, None] * W + FROM + d[None, :], mask=mask, other=0.0)
        if FACTOR:
            other = tl.load(others + u, mask=u >= 0, other=0).to(tl.pointer_type(ELEMENT))
            factor = tl.load(other[:, None] + d[None, :], mask=mask, other=0.0)
            value *= factor.to(tl.float32)
        total += value
    mask = here[:, None] & (d < WIDTH)[None, :]
    tl.store(out + piece[:, None] * WIDTH + d[None, :], total, mask=mask)
