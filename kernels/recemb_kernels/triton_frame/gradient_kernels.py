"""Triton kernels of the way back from the pooled bags to the distinct rows.

Places are positions of a batch sorted by row, so a row has a run of them. Every PIECE places a run that goes
on is cut: a cut's places are summed apart from the row's first, and added to them afterwards. So a row that
most bags have is the work of many programs, and others take one pass. Letters: L places, D columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recemb_kernels.triton_frame.elements import launched
from recemb_kernels.triton_frame.kernels import is_infinite


@launched
def find_gradients(
    start,
    scale,
    order,
    bag,
    weights,
    offsets,
    features,
    batch_size,
    columns,
    count,
    SCALED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BL: tl.constexpr,
):
    """Of the position at each place of ``order``: where its bag's gradient starts, and what multiplies it,
    which is written with SCALED.

    Grid (count / BL). ``features`` [F, 3] holds first column and whether averaged of *every* feature of the
    batch.
    """
    at = tl.program_id(0).to(tl.int64) * BL + tl.arange(0, BL)
    here = at < count
    position = tl.load(order + at, mask=here, other=0).to(tl.int64)
    own = tl.load(bag + position, mask=here, other=0).to(tl.int64)
    feature = own // batch_size
    column = tl.load(features + 3 * feature, mask=here, other=0)
    tl.store(start + at, own % batch_size * columns + column, mask=here)
    if SCALED:
        mean = tl.load(features + 3 * feature + 1, mask=here, other=0)
        begin = tl.load(offsets + own, mask=here, other=0)
        length = tl.load(offsets + own + 1, mask=here, other=1) - begin
        # A refused batch may have ids outside of every bag, and weights that are no numbers: gradients are 0.
        divisor = tl.maximum(tl.where(mean != 0, length, 1), 1).to(tl.float32)
        by = tl.div_rn(tl.full((BL,), 1.0, tl.float32), divisor)
        if WEIGHTED:
            weight = tl.load(weights + position, mask=here, other=0.0).to(tl.float32)
            by *= tl.where(is_infinite(weight), 0.0, weight)
        tl.store(scale + at, by, mask=here)


@triton.jit
def cuts_of(order, inverse, run_first, cuts, count, cut, PIECE: tl.constexpr):
    """Whether cuts, by number, are in a row from ``cuts[0]`` to ``cuts[1]``; that row, the first place of its
    run, its own, and the one after the run."""
    place = cut * PIECE
    here = place < count
    position = tl.load(order + place, mask=here, other=0).to(tl.int64)
    row = tl.load(inverse + position, mask=here, other=0).to(tl.int64)
    here = here & (row >= tl.load(cuts)) & (row < tl.load(cuts + 1))
    begin = tl.load(run_first + row, mask=here, other=0).to(tl.int64)
    end = tl.load(run_first + row + 1, mask=here, other=0).to(tl.int64)
    # Where a run begins at a multiple of PIECE, none is cut.
    return here & (begin < place), row, begin, place, end


@launched
def sum_places(
    out,
    parts,
    grad_out,
    start,
    scale,
    order,
    inverse,
    run_first,
    cuts,
    count,
    row_programs,
    SCALED: tl.constexpr,
    RELATIVE: tl.constexpr,
    PIECE: tl.constexpr,
    D: tl.constexpr,
    BP: tl.constexpr,
    BI: tl.constexpr,
    BD: tl.constexpr,
):
    """out[row] = sum over the row's places up to its first cut of ``scale``, or 1 without SCALED, times the
    gradient from ``start`` on; parts[c] = the same from the c-th cut, of the whole batch, to the next.

    Of the rows from ``cuts[0]`` to ``cuts[1]``; with RELATIVE, ``out`` starts at the first. Grid
    (``row_programs`` + cuts / BP, D / BD), BP rows a program. The loads of BI places are under way at once.
    """
    program = tl.program_id(0).to(tl.int64)
    of_rows = program < row_programs
    low = tl.load(cuts)
    row = low + program * BP + tl.arange(0, BP)
    cut = (program - row_programs) * BP + tl.arange(0, BP)
    if of_rows:
        here = row < tl.load(cuts + 1)
        first = tl.load(run_first + row, mask=here, other=0).to(tl.int64)
        end = tl.load(run_first + row + 1, mask=here, other=0).to(tl.int64)
        length = tl.minimum(end, (first // PIECE + 1) * PIECE) - first
    else:
        here, _, _, first, end = cuts_of(order, inverse, run_first, cuts, count, cut, PIECE)
        length = tl.where(here, tl.minimum(end - first, PIECE), 0)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros((BP, BD), dtype=tl.float32)
    for begin in range(0, tl.max(length, 0), BI):
        for i in tl.static_range(BI):
            inside = begin + i < length
            address = grad_out + tl.load(start + (first + begin + i), mask=inside, other=0).to(tl.int64)
            mask = inside[:, None] & (d < D)[None, :]
            value = tl.load(address[:, None] + d[None, :], mask=mask, other=0.0)
            if SCALED:
                value *= tl.load(scale + (first + begin + i), mask=inside, other=0.0)[:, None]
            total += value
    if RELATIVE:
        row -= low
    mask = here[:, None] & (d < D)[None, :]
    tl.store(out + row[:, None] * D + d[None, :], total, mask=mask & of_rows)
    tl.store(parts + cut[:, None] * D + d[None, :], total, mask=mask & (of_rows == 0))


@launched
def join_places(
    out,
    parts,
    order,
    inverse,
    run_first,
    cuts,
    count,
    RELATIVE: tl.constexpr,
    PIECE: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    """out[row] += the parts of a row that ``sum_places`` cut, one after the other.

    By the program of its first cut; the loads of BC parts are under way at once. Grid (cuts / BN, D / BD).
    """
    cut = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    here, row, begin, place, end = cuts_of(order, inverse, run_first, cuts, count, cut, PIECE)
    here = here & (begin >= place - PIECE)
    length = tl.where(here, (end - place + (PIECE - 1)) // PIECE, 0)
    most = tl.max(length, 0)
    if most == 0:
        return
    if RELATIVE:
        row -= tl.load(cuts)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    at = out + row[:, None] * D + d[None, :]
    mask = here[:, None] & (d < D)[None, :]
    total = tl.load(at, mask=mask, other=0.0)
    for first in range(0, most, BC):
        for i in tl.static_range(BC):
            address = parts + (cut + first + i)[:, None] * D + d[None, :]
            total += tl.load(address, mask=mask & (first + i < length)[:, None], other=0.0)
    tl.store(at, total, mask=mask)
