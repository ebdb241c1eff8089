"""Triton kernels that every op uses: pooling, sums over segments, gradients of weights, updates.

Positions, rows, bags and elements are int64 wherever they are computed with; arrays of positions, rows and
bags are int32. Letters: B samples, D columns of a row, W elements of a parameter row. Names in capitals are
compile-time constants, BB, BD, ... the sizes of a program's tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recemb_kernels.triton_frame.elements import launched

SGD, ADAGRAD, ROWWISE_ADAGRAD, ADAM = (tl.constexpr(kind) for kind in (1, 2, 3, 4))


@triton.jit
def upper_bound(array, size, value, STEPS: tl.constexpr):
    """How many of the rising ``array[:size]`` are <= ``value``, by 2**STEPS > size."""
    low = tl.zeros_like(value)
    high = low + size
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        open_ = low < high
        below = tl.load(array + middle, mask=open_, other=0) <= value
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & (below == 0), middle, high)
    return low


@triton.jit
def is_infinite(value):
    """Whether float32 values are infinite, or no numbers, which compare as false."""
    return (tl.abs(value) <= 3.4028234663852886e38) == 0


@triton.jit
def span_of(offsets, bags, here, num_ids):
    """First position and number of ids of bags.

    Offsets that are refused must not lead out of bounds before the host knows.
    """
    first = tl.maximum(tl.load(offsets + bags, mask=here, other=0), 0)
    return first, tl.minimum(tl.load(offsets + bags + 1, mask=here, other=0), num_ids) - first


@triton.jit
def pieces_of(pieces, piece_first, cuts, BP: tl.constexpr):
    """This program's BP pieces of those of a family's rows: number, whether it is one, first place, length.

    ``pieces`` tells each row's first piece; ``cuts`` points at the family's first row and the one after its
    last.
    """
    high = tl.load(pieces + tl.load(cuts + 1))
    piece = tl.load(pieces + tl.load(cuts)) + tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    here = piece < high
    first = tl.load(piece_first + piece, mask=here, other=0).to(tl.int64)
    return piece, here, first, tl.load(piece_first + piece + 1, mask=here, other=0).to(tl.int64) - first


@launched
def locate(
    table,
    row,
    touched,
    key,
    cuts,
    first_key,
    table_keys,
    num_tables,
    count,
    STEPS: tl.constexpr,
    BR: tl.constexpr,
):
    """Each key's table and row in it, of keys from ``cuts[0]`` to ``cuts[1]``; the others are not touched.

    ``table_keys`` [tables + 1]: each table's first key, counted from ``first_key[0]``. Grid (count / BR).
    """
    at = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    here = at < count
    inside = here & (at >= tl.load(cuts)) & (at < tl.load(cuts + 1))
    base = tl.load(first_key)
    own = tl.load(key + at, mask=inside, other=base) - base
    of = upper_bound(table_keys, num_tables, own, STEPS) - 1
    tl.store(table + at, of, mask=here)
    tl.store(row + at, own - tl.load(table_keys + of, mask=inside, other=0), mask=here)
    tl.store(touched + at, inside.to(tl.int32), mask=here)


@launched
def scatter_rows(out, grad, entry_table, entry_row, touched, cuts, first, W: tl.constexpr, BW: tl.constexpr):
    """out[first[table] + row] = grad[e], in the type of ``out``, of touched entries; -1 leaves a table out.

    Grid (entries, W / BW).
    """
    e = tl.load(cuts) + tl.program_id(0)
    if e >= tl.load(cuts + 1):
        return
    to = tl.load(first + tl.load(entry_table + e))
    if (tl.load(touched + e) == 0) | (to < 0):
        return
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    to += tl.load(entry_row + e)
    tl.store(out + to * W + w, tl.load(grad + e * W + w, mask=w < W), mask=w < W)


@triton.jit
def sum_bags(
    source,
    index,
    weights,
    first,
    length,
    low,
    high,
    d,
    D: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
):
    """[BB, BD]: of bags, the sum of their rows from ``low`` to ``high``."""
    total = tl.zeros((BB, BD), dtype=tl.float32)
    for i in range(tl.max(length, 0)):
        at = first + i
        row = tl.load(index + at, mask=i < length, other=-1).to(tl.int64)
        stored = (i < length) & (row >= low) & (row < high)
        mask = stored[:, None] & (d < D)[None, :]
        address = source + row[:, None] * D + d[None, :]
        value = tl.load(address, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + at, mask=stored, other=0.0)[:, None]
        total += value
    return total


@launched
def pool_rows(
    out,
    sources,
    index,
    weights,
    offsets,
    features,
    limits,
    base,
    spans,
    batch_size,
    columns,
    num_ids,
    turn,
    past,
    turns,
    LIMITS: tl.constexpr,
    INDIRECT: tl.constexpr,
    TURNS: tl.constexpr,
    D: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ELEMENT: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
):
    """out[b, columns of f] = sum or mean over bag (f, b) of w * source_f[index].

    Grid (bags of one feature / BB, features, D / BD). ``sources`` [F] holds addresses of row-major [rows, D]
    arrays of ELEMENT when INDIRECT, else it is the one array of all. ``features`` [F, 3] holds the feature's
    number in the batch, its first column, and whether it is averaged. Indices outside
    ``limits[f * LIMITS]`` .. ``limits[f * LIMITS + 1]`` - 1 are skipped.

    With TURNS, ``sources`` begins at row ``base[0]``, and these are the turns from ``turn`` to ``past`` of
    ``turns``, at rows ``limits[turn]`` .. ``limits[past]``: the sum of a bag in each is added to what earlier
    ones have left in ``out``. The rows of f's table are from ``spans[2 f]`` to ``spans[2 f + 1]``: nothing is
    there before the turn in which they begin, the one in which they end divides the averaged bags, and those
    without any of them leave f alone.
    """
    f = tl.program_id(1)
    bags = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    d = tl.program_id(2) * BD + tl.arange(0, BD)
    feature = tl.load(features + 3 * f)
    column = tl.load(features + 3 * f + 1)
    mean = tl.load(features + 3 * f + 2)
    source = sources
    if INDIRECT:
        source = tl.multiple_of(tl.load(sources + f).to(tl.pointer_type(ELEMENT)), 16)
    here = bags < batch_size
    if TURNS:
        begin = tl.load(spans + 2 * f)
        end = tl.load(spans + 2 * f + 1)
        low = tl.load(limits + turn)
        high = tl.load(limits + past)
        opens = (begin >= low) & ((begin < high) | (past == turns))
        if (opens == 0) & ((begin >= high) | (end <= low)):
            return
        mean = tl.where(end <= high, mean, 0)
        source -= tl.load(base) * D
        first, length = span_of(offsets, feature * batch_size + bags, here, num_ids)
        mask = (here & (opens == 0))[:, None] & (d < D)[None, :]
        total = tl.load(out + bags[:, None] * columns + column + d[None, :], mask=mask, other=0.0)
        for t in range(turn, past):
            low = tl.load(limits + t)
            high = tl.load(limits + t + 1)
            if (begin < high) & (end > low):
                total += sum_bags(source, index, weights, first, length, low, high, d, D, WEIGHTED, BB, BD)
    else:
        low = tl.load(limits + f * LIMITS)
        high = tl.load(limits + f * LIMITS + 1)
        first, length = span_of(offsets, feature * batch_size + bags, here, num_ids)
        total = sum_bags(source, index, weights, first, length, low, high, d, D, WEIGHTED, BB, BD)
    if mean != 0:
        count = tl.maximum(length, 1).to(tl.float32)
        total = tl.div_rn(total, tl.zeros_like(total) + count[:, None])
    mask = here[:, None] & (d < D)[None, :]
    tl.store(out + bags[:, None] * columns + column + d[None, :], total, mask=mask)


@launched
def segment_sum(
    out,
    source,
    first,
    cuts,
    base,
    RELATIVE: tl.constexpr,
    W: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BW: tl.constexpr,
):
    """out[n] = sum of source[first[n] : first[n + 1]], for n from ``cuts[0]`` to ``cuts[1]``.

    Grid (segments / BN, W / BW). The loads of BC rows are under way at once. With RELATIVE, ``out`` starts at
    row ``base[0]``, and ``source`` at the first of row ``cuts[0]``: the workspaces of one micro-batch.
    """
    low = tl.load(cuts)
    high = tl.load(cuts + 1)
    n = low + tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    if low + tl.program_id(0).to(tl.int64) * BN >= high:
        return
    here = n < high
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    begin = tl.load(first + n, mask=here, other=0).to(tl.int64)
    length = tl.load(first + n + 1, mask=here, other=0).to(tl.int64) - begin
    if RELATIVE:
        begin -= tl.load(first + low)
        n -= tl.load(base)
    total = tl.zeros((BN, BW), dtype=tl.float32)
    for start in range(0, tl.max(length, 0), BC):
        for i in tl.static_range(BC):
            mask = (start + i < length)[:, None] & (w < W)[None, :]
            address = source + (begin + start + i)[:, None] * W + w[None, :]
            total += tl.load(address, mask=mask, other=0.0)
    tl.store(out + n[:, None] * W + w[None, :], total, mask=here[:, None] & (w < W)[None, :])


@launched
def weight_gradients(
    out,
    sources,
    index,
    bag,
    offsets,
    grad_out,
    features,
    limits,
    batch_size,
    columns,
    num_ids,
    LIMITS: tl.constexpr,
    INDIRECT: tl.constexpr,
    D: tl.constexpr,
    ELEMENT: tl.constexpr,
    BL: tl.constexpr,
    BD: tl.constexpr,
):
    """out[l] = gradient of the bag of position l, times its row; of the positions of one family's features.

    Grid (positions / BL). ``features`` [F, 3] of *every* feature of the batch: first column, whether averaged
    and its place among ``sources`` and ``limits``, or -1 when another family serves it.
    """
    position = tl.program_id(0).to(tl.int64) * BL + tl.arange(0, BL)
    here = position < num_ids
    own = tl.load(bag + position, mask=here, other=0).to(tl.int64)
    feature = own // batch_size
    sample = own % batch_size
    column = tl.load(features + 3 * feature, mask=here, other=0)
    mean = tl.load(features + 3 * feature + 1, mask=here, other=0)
    f = tl.load(features + 3 * feature + 2, mask=here, other=-1)
    ours = here & (f >= 0)
    row = tl.load(index + position, mask=ours, other=-1).to(tl.int64)
    stored = ours & (row >= tl.load(limits + f * LIMITS, mask=ours, other=0))
    stored = stored & (row < tl.load(limits + f * LIMITS + 1, mask=ours, other=0))
    total = tl.zeros((BL,), dtype=tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        mask = stored[:, None] & (d < D)[None, :]
        if INDIRECT:
            source = tl.load(sources + f, mask=ours, other=0).to(tl.pointer_type(ELEMENT))
            value = tl.load(source[:, None] + row[:, None] * D + d[None, :], mask=mask, other=0.0)
        else:
            value = tl.load(sources + row[:, None] * D + d[None, :], mask=mask, other=0.0)
        grad = tl.load(grad_out + (sample * columns + column)[:, None] + d[None, :], mask=mask, other=0.0)
        total += tl.sum(value.to(tl.float32) * grad, 1)
    begin = tl.load(offsets + own, mask=here, other=0)
    count = tl.load(offsets + own + 1, mask=here, other=1) - begin
    total = tl.div_rn(total, tl.maximum(tl.where(mean != 0, count, 1), 1).to(tl.float32))
    tl.store(out + position, total, mask=ours)


@launched
def update_rows(
    grad,
    entry_table,
    entry_row,
    touched,
    refused,
    parameters,
    states,
    states2,
    cuts,
    rates,
    KIND: tl.constexpr,
    W: tl.constexpr,
    ELEMENT: tl.constexpr,
    STATE: tl.constexpr,
    BE: tl.constexpr,
    BW: tl.constexpr,
):
    """One optimizer step on each touched parameter row, given its whole gradient ``grad[e]`` [W].

    Grid (entries / BE). Entry e is row ``entry_row[e]`` of the parameter at ``parameters[entry_table[e]]``,
    an address; its optimizer's states lie at ``states`` and ``states2``, its rates in ``rates`` [tables, 7].
    Entries from ``cuts[0]`` to ``cuts[1]`` take part, where ``touched`` is not 0 and ``refused[0]``, the mark
    of a non-finite gradient, is 0. The formulas are ``recemb_optim.h``'s.
    """
    begin = tl.load(cuts) + tl.program_id(0).to(tl.int64) * BE
    end = tl.load(cuts + 1)
    if (begin >= end) | (tl.load(refused) != 0):
        return
    e = begin + tl.arange(0, BE)
    here = e < end
    here = here & (tl.load(touched + e, mask=here, other=0) != 0)
    table = tl.load(entry_table + e, mask=here, other=0)
    row = tl.load(entry_row + e, mask=here, other=0)
    parameter = tl.load(parameters + table, mask=here, other=0).to(tl.pointer_type(ELEMENT))
    parameter = tl.multiple_of(parameter, 16)
    lr = tl.load(rates + 7 * table, mask=here, other=0.0)[:, None]
    eps = tl.load(rates + 7 * table + 1, mask=here, other=1.0)[:, None]
    scale = lr
    if KIND == ROWWISE_ADAGRAD:
        square = tl.zeros((BE, BW), dtype=tl.float32)
        for start in range(0, W, BW):
            w = (start + tl.arange(0, BW))[None, :]
            g = tl.load(grad + e[:, None] * W + w, mask=here[:, None] & (w < W), other=0.0)
            square += g * g
        state = tl.load(states + table, mask=here, other=0).to(tl.pointer_type(STATE)) + row
        sum_ = tl.load(state, mask=here, other=0.0).to(tl.float32) + tl.sum(square, 1) / W
        tl.store(state, sum_, mask=here)
        scale = tl.div_rn(lr, tl.sqrt_rn(sum_)[:, None] + eps)
    for start in range(0, W, BW):
        w = (start + tl.arange(0, BW))[None, :]
        inside = here[:, None] & (w < W)
        at = row[:, None] * W + w
        g = tl.load(grad + e[:, None] * W + w, mask=inside, other=0.0)
        value = tl.load(parameter[:, None] + at, mask=inside, other=0.0).to(tl.float32)
        if KIND == ADAGRAD:
            state = tl.load(states + table, mask=here, other=0).to(tl.pointer_type(STATE))[:, None] + at
            sums = tl.load(state, mask=inside, other=0.0).to(tl.float32) + g * g
            tl.store(state, sums, mask=inside)
            step = tl.div_rn(lr * g, tl.sqrt_rn(sums) + eps)
        elif KIND == ADAM:
            beta1 = tl.load(rates + 7 * table + 2, mask=here, other=0.0)[:, None]
            rest1 = tl.load(rates + 7 * table + 3, mask=here, other=0.0)[:, None]
            beta2 = tl.load(rates + 7 * table + 4, mask=here, other=0.0)[:, None]
            rest2 = tl.load(rates + 7 * table + 5, mask=here, other=0.0)[:, None]
            root = tl.load(rates + 7 * table + 6, mask=here, other=1.0)[:, None]
            state = tl.load(states + table, mask=here, other=0).to(tl.pointer_type(STATE))[:, None] + at
            state2 = tl.load(states2 + table, mask=here, other=0).to(tl.pointer_type(STATE))[:, None] + at
            mean = beta1 * tl.load(state, mask=inside, other=0.0).to(tl.float32) + rest1 * g
            variance = beta2 * tl.load(state2, mask=inside, other=0.0).to(tl.float32) + rest2 * g * g
            tl.store(state, mean, mask=inside)
            tl.store(state2, variance, mask=inside)
            root = tl.zeros_like(variance) + root
            step = tl.div_rn(lr * mean, tl.div_rn(tl.sqrt_rn(variance), root) + eps)
        else:
            step = scale * g
        tl.store(parameter[:, None] + at, value - step, mask=inside)
