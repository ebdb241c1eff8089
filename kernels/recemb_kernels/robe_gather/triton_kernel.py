"""Triton kernels of tables that read blocks of one shared array at hashed places.

A row of D columns is BLOCKS blocks of Z, the last one shorter. ``tables`` [V, 9 + 2 BLOCKS] describes
every table of every array: the array's place in the family, its first key, the coefficients B and Q of the
slot's and of the sign's hash, the array's size |M|, floor(2**61 / |M|), the weights of the arrays before it,
and what the hash of each block adds, for slots and then for signs. A block's start is counted over the
weights of all arrays.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recemb_kernels.triton_frame.elements import launched
from recemb_kernels.triton_frame.kernels import pieces_of, span_of, upper_bound

HEAD = tl.constexpr(9)
MERSENNE = tl.constexpr(2**61 - 1)


@triton.jit
def multiply(a, b):
    """a b mod 2**61 - 1 of uint64 below it."""
    low = a * b
    folded = (low & MERSENNE) + ((tl.umulhi(a, b) << 3) | (low >> 61))
    return tl.where(folded >= MERSENNE, folded - MERSENNE, folded)


@triton.jit
def add(a, b):
    """a + b mod 2**61 - 1 of uint64 below it."""
    total = a + b
    return tl.where(total >= MERSENNE, total - MERSENNE, total)


@triton.jit
def hash_row(x, linear, square):
    """Q x**2 + B x mod 2**61 - 1, as uint64."""
    x = x.to(tl.uint64)
    return multiply(add(multiply(x, square.to(tl.uint64)), linear.to(tl.uint64)), x)


@triton.jit
def place(hashed, offset, size, reciprocal):
    """(hash + offset) mod 2**61 - 1 mod |M|, without a division: the quotient is at most one too small."""
    value = add(hashed, offset.to(tl.uint64))
    rest = value - tl.umulhi(value << 3, reciprocal.to(tl.uint64)) * size.to(tl.uint64)
    return tl.where(rest >= size.to(tl.uint64), rest - size.to(tl.uint64), rest).to(tl.int64)


@launched
def pool_blocks(
    out,
    arrays,
    tables,
    ids,
    weights,
    offsets,
    features,
    lookups,
    batch_size,
    columns,
    num_ids,
    D: tl.constexpr,
    Z: tl.constexpr,
    BLOCKS: tl.constexpr,
    SIGNED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ELEMENT: tl.constexpr,
    BB: tl.constexpr,
    BK: tl.constexpr,
    BZ: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """out[b, columns of f] = sum or mean over bag (f, b) of w * row(id).

    Grid (bags of one feature / BB, features, tiles of BK blocks in CHUNKS parts of BZ columns). ``arrays``
    holds addresses; ``features`` [F, 3] the number in the batch, first column and whether averaged;
    ``lookups`` [F, 3] the table, what is added to ids, and the ids that the feature has.
    """
    f = tl.program_id(1)
    bags = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    k = tl.program_id(2) // CHUNKS * BK + tl.arange(0, BK)
    j = tl.program_id(2) % CHUNKS * BZ + tl.arange(0, BZ)
    feature = tl.load(features + 3 * f)
    column = tl.load(features + 3 * f + 1)
    mean = tl.load(features + 3 * f + 2)
    table = tables + tl.load(lookups + 3 * f) * (HEAD + 2 * BLOCKS)
    key_base = tl.load(lookups + 3 * f + 1)
    high = tl.load(lookups + 3 * f + 2)
    array = tl.load(arrays + tl.load(table)).to(tl.pointer_type(ELEMENT))
    size = tl.load(table + 6)
    reciprocal = tl.load(table + 7)
    slot_offset = tl.load(table + HEAD + k, mask=k < BLOCKS, other=0)
    sign_offset = tl.load(table + HEAD + BLOCKS + k, mask=k < BLOCKS, other=0)
    # Columns of a row are those of its blocks, as long as they last.
    column_of = k[:, None] * Z + j[None, :]
    within = (k < BLOCKS)[:, None] & (j < Z)[None, :] & (column_of < D)
    here = bags < batch_size
    first, length = span_of(offsets, feature * batch_size + bags, here, num_ids)
    total = tl.zeros((BB, BK, BZ), dtype=tl.float32)
    for i in range(tl.max(length, 0)):
        at = first + i
        row = tl.load(ids + at, mask=i < length, other=-1)
        stored = (row >= 0) & (row < high)
        x = row + key_base
        slot = hash_row(x, tl.load(table + 2), tl.load(table + 3))
        start = place(slot[:, None], slot_offset[None, :], size, reciprocal)
        position = start[:, :, None] + j[None, None, :]
        position = tl.where(position >= size, position - size, position)
        mask = stored[:, None, None] & within[None, :, :]
        value = tl.load(array + position, mask=mask, other=0.0).to(tl.float32)
        factor = tl.full((BB, BK), 1.0, tl.float32)
        if SIGNED:
            hashed = hash_row(x, tl.load(table + 4), tl.load(table + 5))
            odd = add(hashed[:, None], sign_offset[None, :].to(tl.uint64)) & 1
            factor = tl.where(odd != 0, -1.0, 1.0)
        if WEIGHTED:
            factor *= tl.load(weights + at, mask=stored, other=0.0)[:, None]
        total += value * factor[:, :, None]
    if mean != 0:
        count = tl.maximum(length, 1).to(tl.float32)
        total = tl.div_rn(total, tl.zeros_like(total) + count[:, None, None])
    to = bags[:, None, None] * columns + column + column_of[None, :, :]
    tl.store(out + to, total, mask=here[:, None, None] & within[None, :, :])


@launched
def place_blocks(
    start,
    negative,
    row_key,
    cuts,
    first_key,
    table_keys,
    tables,
    num_tables,
    weights_of_all,
    count,
    BLOCKS: tl.constexpr,
    SIGNED: tl.constexpr,
    STEPS: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """Start and sign of every block of the distinct rows, [count, BLOCKS]; others start past all arrays.

    ``table_keys`` [V + 1]: first key of each table, counted from ``first_key[0]``. Grid (count / BR,
    BLOCKS / BK).
    """
    u = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (u < count) & (u >= tl.load(cuts)) & (u < tl.load(cuts + 1))
    base = tl.load(first_key)
    key = tl.load(row_key + u, mask=inside, other=base) - base
    table = (upper_bound(table_keys, num_tables, key, STEPS) - 1) * (HEAD + 2 * BLOCKS)
    x = key - tl.load(tables + (table + 1))
    slot = hash_row(x, tl.load(tables + (table + 2)), tl.load(tables + (table + 3)))
    offset = tl.load(tables + (table[:, None] + HEAD + k[None, :]), mask=(k < BLOCKS)[None, :], other=0)
    size, reciprocal = tl.load(tables + (table + 6)), tl.load(tables + (table + 7))
    placed = place(slot[:, None], offset, size[:, None], reciprocal[:, None])
    placed = tl.where(inside[:, None], placed + tl.load(tables + (table + 8))[:, None], weights_of_all)
    to = u[:, None] * BLOCKS + k[None, :]
    mask = (u < count)[:, None] & (k < BLOCKS)[None, :]
    tl.store(start + to, placed, mask=mask)
    if SIGNED:
        hashed = hash_row(x, tl.load(tables + (table + 4)), tl.load(tables + (table + 5)))
        to_sign = tables + (table[:, None] + HEAD + BLOCKS + k[None, :])
        offset = tl.load(to_sign, mask=(k < BLOCKS)[None, :], other=0)
        odd = add(hashed[:, None], offset.to(tl.uint64)) & 1
        tl.store(negative + to, odd.to(tl.int8), mask=mask)


@launched
def read_rows(
    out,
    arrays,
    array_rows,
    start,
    negative,
    cuts,
    num_arrays,
    D: tl.constexpr,
    Z: tl.constexpr,
    BLOCKS: tl.constexpr,
    SIGNED: tl.constexpr,
    STEPS: tl.constexpr,
    ELEMENT: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """out[u] [D] = the distinct rows u from ``cuts[0]`` to ``cuts[1]``. Grid (rows / BR, D / BD).

    ``array_rows`` [arrays + 1]: first row of each array among those of all.
    """
    u = tl.load(cuts) + tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = (u < tl.load(cuts + 1))[:, None] & (d < D)[None, :]
    block = u[:, None] * BLOCKS + (d // Z)[None, :]
    begin = tl.load(start + block, mask=mask, other=0).to(tl.int64)
    a = upper_bound(array_rows, num_arrays, begin // Z, STEPS) - 1
    low = tl.load(array_rows + a) * Z
    size = tl.load(array_rows + a + 1) * Z - low
    position = begin - low + (d % Z)[None, :]
    position = tl.where(position >= size, position - size, position)
    array = tl.load(arrays + a).to(tl.pointer_type(ELEMENT))
    value = tl.load(array + position, mask=mask, other=0.0).to(tl.float32)
    if SIGNED:
        value = tl.where(tl.load(negative + block, mask=mask, other=0) != 0, -value, value)
    tl.store(out + u[:, None] * D + d[None, :], value, mask=mask)


@launched
def sum_blocks(
    out,
    grad_rows,
    start,
    order,
    negative,
    piece_first,
    run_piece,
    cuts,
    D: tl.constexpr,
    Z: tl.constexpr,
    BLOCKS: tl.constexpr,
    SIGNED: tl.constexpr,
    BP: tl.constexpr,
    BD: tl.constexpr,
):
    """out[p] [2 Z] = sum of the gradients of the blocks of piece p, which start in one array row.

    They reach into the row after it: its share is the second half. ``start`` is sorted, ``order`` the blocks
    in its order. Grid (pieces / BP, 2 Z / BD).
    """
    piece, here, first, length = pieces_of(run_piece, piece_first, cuts, BP)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros((BP, BD), dtype=tl.float32)
    for i in range(tl.max(length, 0)):
        inside = i < length
        # -1 marks what is left out: one mask for several loads has broken Triton 3.7's choice of layouts.
        block = tl.load(order + first + i, mask=inside, other=-1)
        shift = tl.load(start + first + i, mask=inside, other=0) % Z
        j = d[None, :] - shift[:, None]
        column = (block % BLOCKS)[:, None] * Z + j
        mask = (block >= 0)[:, None] & (j >= 0) & (j < Z) & (column < D)
        value = tl.load(grad_rows + (block // BLOCKS)[:, None] * D + column, mask=mask, other=0.0)
        if SIGNED:
            odd = tl.load(negative + block, mask=block >= 0, other=0) != 0
            value = tl.where(odd[:, None], -value, value)
        total += value
    mask = here[:, None] & (d < 2 * Z)[None, :]
    tl.store(out + piece[:, None] * (2 * Z) + d[None, :], total, mask=mask)


@triton.jit
def find(rows, cuts, row, STEPS: tl.constexpr):
    """Where each of ``row`` stands among the rising rows from ``cuts[0]`` to ``cuts[1]``, or -1."""
    low = tl.load(cuts)
    at = upper_bound(rows + low, tl.load(cuts + 1) - low, row, STEPS) - 1
    known = tl.load(rows + low + at, mask=at >= 0, other=-1)
    return tl.where(known == row, low + at, -1)


@launched
def match_rows(
    table,
    row,
    touched,
    own,
    before,
    run_row,
    run_first,
    spilled,
    cuts,
    array_rows,
    num_arrays,
    most,
    ARRAY_STEPS: tl.constexpr,
    STEPS: tl.constexpr,
    BR: tl.constexpr,
):
    """The array rows that a batch touches, and where their gradients lie.

    Run r of blocks that start in array row ``run_row[r]`` makes two entries: 2 r for that row, and 2 r + 1
    for the row after it if no block starts there and one reaches into it. An entry sums the first half of
    run ``own`` and the second half of run ``before``, if not -1. ``spilled`` [K + 1] counts the blocks that
    reach beyond their row, among those sorted before. Grid (runs / BR).
    """
    run = tl.load(cuts) + tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    here = run < tl.load(cuts + 1)
    at = tl.load(run_row + run, mask=here, other=0)
    a = upper_bound(array_rows, num_arrays, at, ARRAY_STEPS) - 1
    low = tl.load(array_rows + a)
    last = tl.load(array_rows + a + 1) - 1
    # The array is circular.
    previous = find(run_row, cuts, tl.where(at == low, last, at - 1), STEPS)
    following = tl.where(at == last, low, at + 1)
    owned = find(run_row, cuts, following, STEPS) >= 0
    first = tl.load(run_first + run, mask=here, other=0).to(tl.int64)
    end = tl.load(run_first + run + 1, mask=here, other=0).to(tl.int64)
    reaches = tl.load(spilled + end, mask=here, other=0) > tl.load(spilled + first, mask=here, other=0)
    one = tl.full((BR,), 1, tl.int32)
    tl.store(table + 2 * run, a, mask=here)
    tl.store(row + 2 * run, at - low, mask=here)
    tl.store(touched + 2 * run, one, mask=here)
    tl.store(own + 2 * run, run, mask=here)
    tl.store(before + 2 * run, previous, mask=here)
    tl.store(table + 2 * run + 1, a, mask=here)
    tl.store(row + 2 * run + 1, following - low, mask=here)
    tl.store(touched + 2 * run + 1, (reaches & (owned == 0)).to(tl.int32), mask=here)
    tl.store(own + 2 * run + 1, tl.zeros_like(run) - 1, mask=here)
    tl.store(before + 2 * run + 1, run, mask=here)
    # Past the last entry stand tables that exist.
    rest = (run < most) & (here == 0)
    tl.store(table + 2 * run, tl.zeros_like(run), mask=rest)
    tl.store(table + 2 * run + 1, tl.zeros_like(run), mask=rest)


@launched
def join_halves(out, sums, touched, own, before, cuts, Z: tl.constexpr, BZ: tl.constexpr):
    """out[e] [Z] = the gradient of each touched entry, from sums of runs [., 2 Z]. Grid (entries, Z / BZ)."""
    e = tl.load(cuts) + tl.program_id(0)
    if e >= tl.load(cuts + 1):
        return
    if tl.load(touched + e) == 0:
        return
    z = tl.program_id(1) * BZ + tl.arange(0, BZ)
    first = tl.load(own + e)
    second = tl.load(before + e)
    total = tl.load(sums + first * (2 * Z) + z, mask=(z < Z) & (first >= 0), other=0.0)
    total += tl.load(sums + second * (2 * Z) + Z + z, mask=(z < Z) & (second >= 0), other=0.0)
    tl.store(out + e * Z + z, total, mask=z < Z)
