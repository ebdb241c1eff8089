"""Triton kernels that check a batch, give its positions keys, and number runs of equal keys.

Letters: L positions, K bounds, P blocks of BL places. Names in capitals are compile-time constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recemb_kernels.triton_frame.elements import launched
from recemb_kernels.triton_frame.kernels import is_infinite, upper_bound


@triton.jit
def bag_at(offsets, num_bags, at, count, STEPS: tl.constexpr):
    """The bag of positions of ``count``, by 2**STEPS > num_bags + 1.

    Where there are as many ids as all bags can have alike, each is first looked for where it would be then.
    Offsets that are refused must not lead out of bounds before the host knows.
    """
    last = tl.zeros((), tl.int64) + num_bags
    total = tl.zeros((), tl.int64) + count
    each = total // tl.maximum(last, 1)
    bag = tl.zeros_like(at)
    missing = at < total
    if (each > 0) & (each * last == total):
        bag = tl.minimum(at, total - 1) // each
        begin = tl.load(offsets + bag, mask=missing, other=0)
        missing = missing & ((begin > at) | (tl.load(offsets + bag + 1, mask=missing, other=0) <= at))
    if tl.max(missing.to(tl.int32), 0) != 0:
        bag = upper_bound(offsets, last + 1, at, STEPS) - 1
        bag = tl.minimum(tl.maximum(bag, 0), tl.maximum(last - 1, 0))
    return bag


@launched
def check_batch(
    refused,
    ids,
    offsets,
    weights,
    rows,
    batch_size,
    num_bags,
    count,
    WEIGHTED: tl.constexpr,
    STEPS: tl.constexpr,
    BL: tl.constexpr,
):
    """refused[0] = 1 when offsets do not rise from 0 to ``count``, an id has no row, or a weight is infinite.

    ``rows`` [F]: of each feature's table. Grid (more than the larger of ``count`` and ``num_bags`` / BL).
    """
    at = tl.program_id(0).to(tl.int64) * BL + tl.arange(0, BL)
    low = tl.load(offsets + at, mask=at <= num_bags, other=0)
    high = tl.load(offsets + at + 1, mask=at < num_bags, other=0)
    bad = (at < num_bags) & (high < low)
    bad = bad | ((at == 0) & (low != 0)) | ((at == num_bags) & (low != count))
    here = at < count
    feature = bag_at(offsets, num_bags, at, count, STEPS) // batch_size
    id_ = tl.load(ids + at, mask=here, other=0)
    bad = bad | (here & ((id_ < 0) | (id_ >= tl.load(rows + feature, mask=here, other=1))))
    if WEIGHTED:
        weight = tl.load(weights + at, mask=here, other=0.0).to(tl.float32)
        bad = bad | is_infinite(weight)
    if tl.max(bad.to(tl.int32), 0) != 0:
        tl.store(refused, 1)


@launched
def mark_infinite(mark, values, count, BL: tl.constexpr):
    """mark[0] = 1 when one of ``values`` [count] is NaN or infinite. Grid (count / BL)."""
    at = tl.program_id(0).to(tl.int64) * BL + tl.arange(0, BL)
    value = tl.load(values + at, mask=at < count, other=0.0)
    if tl.max(is_infinite(value).to(tl.int32), 0) != 0:
        tl.store(mark, 1)


@launched
def place_ids(
    keys,
    bag,
    ids,
    offsets,
    base,
    rows,
    nothing,
    batch_size,
    num_bags,
    count,
    STEPS: tl.constexpr,
    BL: tl.constexpr,
):
    """Each position's bag, and its key: its id plus its feature's base, or ``nothing[0]`` without a row.

    ``base`` and ``rows`` [F]. Grid (count / BL).
    """
    at = tl.program_id(0).to(tl.int64) * BL + tl.arange(0, BL)
    here = at < count
    own = bag_at(offsets, num_bags, at, count, STEPS)
    feature = own // batch_size
    id_ = tl.load(ids + at, mask=here, other=-1)
    stored = (id_ >= 0) & (id_ < tl.load(rows + feature, mask=here, other=0))
    key = tl.where(stored, id_ + tl.load(base + feature, mask=here, other=0), tl.load(nothing))
    tl.store(keys + at, key, mask=here)
    tl.store(bag + at, own, mask=here)


@triton.jit
def begins(keys, at, count, PIECE: tl.constexpr):
    """Key of each place, and whether a run, and a piece of one, begins there."""
    here = at < count
    key = tl.load(keys + at, mask=here, other=0)
    before = tl.load(keys + at - 1, mask=here & (at > 0), other=0)
    new = here & ((at == 0) | (key != before))
    return key, before, new, new | (here & (at % PIECE == 0))


@launched
def count_runs(counts, keys, count, PIECE: tl.constexpr, BL: tl.constexpr):
    """counts[p] = runs and pieces that begin in block p. Grid (P)."""
    block = tl.program_id(0).to(tl.int64)
    _, _, new, piece = begins(keys, block * BL + tl.arange(0, BL), count, PIECE)
    tl.store(counts + 2 * block, tl.sum(new.to(tl.int32), 0))
    tl.store(counts + 2 * block + 1, tl.sum(piece.to(tl.int32), 0))


@triton.jit
def totals(counts, width, column, block, blocks, BB: tl.constexpr):
    """Sums of one column of ``counts`` [P, width]: of the blocks before this one, and of all."""
    before = tl.zeros((BB,), tl.int64)
    every = tl.zeros((BB,), tl.int64)
    for start in range(0, blocks, BB):
        b = start + tl.arange(0, BB)
        own = tl.load(counts + b * width + column, mask=b < blocks, other=0).to(tl.int64)
        before += tl.where(b < block, own, 0)
        every += own
    # Once: threads that add up wait for each other.
    return tl.sum(before, 0), tl.sum(every, 0)


@launched
def number_runs(
    number,
    inverse,
    run_key,
    first,
    piece_first,
    run_piece,
    cuts,
    counts,
    keys,
    order,
    bounds,
    num_bounds,
    count,
    blocks,
    WHOLE: tl.constexpr,
    INVERSE: tl.constexpr,
    PIECE: tl.constexpr,
    BL: tl.constexpr,
    BB: tl.constexpr,
):
    """What :class:`~recemb_kernels.triton_frame.plan.Runs` holds, of rising ``keys`` [L]. Grid (P, P BL > L).

    With WHOLE, every run is one piece and ``piece_first`` is not written. With INVERSE too, ``inverse`` takes
    the run of each position ``order`` names; ``number`` and ``run_piece`` are written without.
    """
    block = tl.program_id(0).to(tl.int64)
    at = block * BL + tl.arange(0, BL)
    key, before, new, piece = begins(keys, at, count, PIECE)
    runs_before, runs = totals(counts, 2, 0, block, blocks, BB)
    here = at < count
    run = runs_before + tl.cumsum(new.to(tl.int64), 0) - 1
    if INVERSE:
        tl.store(inverse + tl.load(order + at, mask=here, other=0).to(tl.int64), run, mask=here)
    else:
        tl.store(number + at, run, mask=here)
    tl.store(run_key + run, key, mask=new)
    rest = (at >= runs) & (at <= count)
    tl.store(first + run, at, mask=new)
    tl.store(first + at, tl.zeros_like(at) + count, mask=rest)
    nothing = tl.load(bounds + num_bounds - 1)
    tl.store(run_key + at, tl.zeros_like(at) + nothing, mask=rest & here)
    if WHOLE and not INVERSE:
        tl.store(run_piece + at, at, mask=at <= count)
    if not WHOLE:
        pieces_before, pieces = totals(counts, 2, 1, block, blocks, BB)
        place = pieces_before + tl.cumsum(piece.to(tl.int64), 0) - 1
        tl.store(piece_first + place, at, mask=piece)
        tl.store(run_piece + run, place, mask=new)
        tl.store(run_piece + at, tl.zeros_like(at) + pieces, mask=rest)
        tl.store(piece_first + at, tl.zeros_like(at) + count, mask=(at >= pieces) & (at <= count))
    last = tl.load(keys + (tl.zeros((), tl.int64) + count - 1))
    for k in range(num_bounds):
        bound = tl.load(bounds + k)
        reached = new & (key >= bound) & ((at == 0) | (before < bound))
        tl.store(cuts + k + tl.zeros_like(at), run, mask=reached)
        if (block == 0) & (last < bound):
            tl.store(cuts + k, runs)
