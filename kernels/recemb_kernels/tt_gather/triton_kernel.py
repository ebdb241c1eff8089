"""Triton kernels of tensor-train tables: products of cores over the distinct prefixes of a batch, and back.

Level l has one node per distinct prefix (i_1 .. i_l); rows are the nodes of the last. A node's product of
cores is a [Q, R] matrix, Q = q_1 .. q_l; its child's is [Q, K] times the child's core slice [K, N], with
K = R_l and N = q_{l+1} R_{l+1}. Children with one digit share a slice, so they are grouped by it, and a group
is one matrix product with rows m = (node, j), j < Q. BM, BK, BN are tiles of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recemb_kernels.triton_frame.elements import launched
from recemb_kernels.triton_frame.kernels import upper_bound
from recemb_kernels.triton_frame.plan_kernels import totals


@triton.jit
def product(a, b, total, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """total + a b, by the tensor cores' instruction or by plain multiply-adds."""
    if DOT and PRECISION == "ieee":
        # Multiply-adds one after the other: to add a tile's sum to the total loses less than a single chain,
        # which is what Triton makes of total + tl.dot(a, b).
        return tl.fma(tl.dot(a, b, input_precision=PRECISION), tl.full(total.shape, 1.0, tl.float32), total)
    if DOT:
        return tl.dot(a, b, total, input_precision=PRECISION)
    # A product written with * is turned into a tl.dot that rounds to TF32, whatever PRECISION says.
    left, right = tl.broadcast(a.to(tl.float32)[:, :, None], b.to(tl.float32)[None, :, :])
    return total + tl.sum(tl.fma(left, right, tl.zeros_like(left)), 1)


@launched
def split_digits(
    digits,
    last,
    new,
    row_key,
    cuts,
    first_key,
    table_keys,
    radices,
    entry_base,
    num_tables,
    count,
    part_rows,
    ORDER: tl.constexpr,
    STEPS: tl.constexpr,
    BR: tl.constexpr,
):
    """Each row's core slices, and where a new prefix of each length begins.

    ``digits`` [ORDER - 1, count] and ``last`` [count]: the entry of each of its slices, ``entry_base[table,
    k]`` + digit k, that of the last core apart. ``new`` [ORDER - 1, count]: whether the row's first k + 1
    digits differ from those of the row before, or a part of ``part_rows`` rows begins. ``table_keys``
    [tables + 1] and ``radices`` [tables, ORDER] describe the tables; ``first_key`` is the family's first key.
    Grid (count / BR).
    """
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    total = tl.zeros((), tl.int64) + count
    low = tl.load(cuts)
    inside = (row >= low) & (row < tl.load(cuts + 1))
    base = tl.load(first_key)
    key = tl.load(row_key + row, mask=inside, other=0) - base
    before = tl.load(row_key + row - 1, mask=inside & (row > low), other=0) - base
    table = upper_bound(table_keys, num_tables, key, STEPS) - 1
    table = tl.where(inside, table, 0)
    key -= tl.load(table_keys + table)
    before -= tl.load(table_keys + table)
    # A key of an earlier table is negative here: its quotients may be those of this one's all the same.
    fresh = ((row - low) % part_rows == 0) | (before < 0)
    if row_key.dtype.element_ty == tl.int32:  # 64 bits take several times as long to divide
        key = key.to(tl.int32)
        before = before.to(tl.int32)
    for down in tl.static_range(ORDER - 1):
        k = ORDER - 1 - down
        radix = tl.load(radices + table * ORDER + k).to(key.dtype)
        entry = tl.load(entry_base + table * ORDER + k) + key % radix
        key = key // radix
        before = before // radix
        is_new = inside & (fresh | (key != before))
        to = digits + (k * total + row) if down else last + row
        tl.store(to, entry, mask=row < total)
        tl.store(new + ((k - 1) * total + row), is_new.to(tl.int8), mask=row < total)
    tl.store(digits + row, tl.load(entry_base + table * ORDER) + key, mask=row < total)


@launched
def count_nodes(counts, new, count, ORDER: tl.constexpr, BL: tl.constexpr):
    """counts[p, k] = nodes of level k + 1 that begin in block p of BL rows. Grid (P)."""
    block = tl.program_id(0).to(tl.int64)
    at = block * BL + tl.arange(0, BL)
    total = tl.zeros((), tl.int64) + count
    for k in tl.static_range(ORDER - 1):
        begins = tl.load(new + (k * total + at), mask=at < count, other=0).to(tl.int32)
        tl.store(counts + block * (ORDER - 1) + k, tl.sum(begins, 0))


@launched
def place_nodes(
    entry,
    parent,
    child,
    node_cuts,
    group_key,
    counts,
    digits,
    last,
    new,
    cuts,
    slices,
    prefixes,
    count,
    blocks,
    num_parts,
    part_rows,
    num_micro_batches,
    micro_batch_rows,
    ORDER: tl.constexpr,
    ALIGNED: tl.constexpr,
    BL: tl.constexpr,
    BB: tl.constexpr,
):
    """The nodes of every level, numbered in the order of their rows; rows are those of the last.

    ``entry`` of the first level, ``parent`` and ``group_key`` of the others, ``child`` of all but the last,
    one level after the other, and ``node_cuts`` [ORDER, S + 1] are those of
    :class:`~recemb_kernels.tt_gather.triton_levels.Level`: of T parts, ``num_parts``, or of rows S
    micro-batches. Level k has room for ``prefixes[k]`` + T - 1 nodes, L at most, made a multiple of ALIGNED,
    and rows for L; ``child`` for ALIGNED more. ``group_key``: part times ``slices[k]`` plus slice, one past
    the last of these where there is no node. ``digits``, ``last`` and ``new`` come from ``split_digits``.
    Grid (P, P BL > L).
    """
    block = tl.program_id(0).to(tl.int64)
    at = block * BL + tl.arange(0, BL)
    here = at < count
    total = tl.zeros((), tl.int64) + count
    low = tl.load(cuts)
    high = tl.load(cuts + 1)
    inside = (at >= low) & (at < high)
    # Rows, the nodes of the last level, are numbered from the first of the batch, not of the family.
    above = at
    above_end = high
    # Where the level's parents, and the children of the one above, begin.
    own_at = tl.zeros((), tl.int64)
    child_at = tl.zeros((), tl.int64)
    size = total
    for level in tl.static_range(ORDER):
        own_parts = num_parts if level < ORDER - 1 else num_micro_batches
        own_rows = tl.zeros((), tl.int64) + (part_rows if level < ORDER - 1 else micro_batch_rows)
        part = tl.where(inside, (at - low) // own_rows, 0)
        above_size = size
        if level < ORDER - 1:
            size = tl.minimum(total, tl.load(prefixes + level) + num_parts - 1)
            size = (size + (ALIGNED - 1)) // ALIGNED * ALIGNED
            digit = tl.load(digits + (level * total + at), mask=here, other=0)
            begins = tl.load(new + (level * total + at), mask=here, other=0) != 0
            before, every = totals(counts, ORDER - 1, level, block, blocks, BB)
            node = before + tl.cumsum(begins.to(tl.int64), 0) - 1
            end = every
        else:
            size = total
            digit = tl.load(last + at, mask=here, other=0)
            begins = inside
            node = at
            end = high
        if level == 0:
            tl.store(entry + node, digit, mask=begins)
        if level > 0:
            tl.store(parent + (own_at + node), above, mask=begins)
            # The first node of a prefix is the first child of the one above.
            opened = tl.load(new + ((level - 1) * total + at), mask=here, other=0) != 0
            tl.store(child + (child_at + above), node, mask=opened)
            if block == 0:
                tl.store(child + (child_at + above_end), end)
            child_at += above_size + ALIGNED
            wide = tl.load(slices + level)
            key = part * wide + digit
            tl.store(group_key + (own_at + node), key, mask=begins)
            none = (at < size) & ((at >= end) | (at < (low if level == ORDER - 1 else 0)))
            tl.store(group_key + (own_at + at), tl.zeros_like(at) + own_parts * wide, mask=none)
            own_at += size
        opens = inside & ((at - low) % own_rows == 0)
        tl.store(node_cuts + (level * (num_micro_batches + 1) + part), node, mask=opens)
        if block == 0:
            for s in range(own_parts + 1):
                if low + s * own_rows >= high:
                    tl.store(node_cuts + (level * (num_micro_batches + 1) + s), end)
        above = node
        above_end = end


@launched
def group_bounds(
    first, tiles, keys, count, num_groups, wide, STEPS: tl.constexpr, TILE: tl.constexpr, BG: tl.constexpr
):
    """first[g] = places of rising ``keys`` below g; tiles[g + 1] = tiles of group g, ``wide`` rows a node.

    Grid (more than ``num_groups`` / BG).
    """
    g = tl.program_id(0).to(tl.int64) * BG + tl.arange(0, BG)
    begin = upper_bound(keys, count, g - 1, STEPS)
    end = upper_bound(keys, count, g, STEPS)
    tl.store(first + g, begin, mask=g <= num_groups)
    tl.store(tiles + g + 1, ((end - begin) * wide + (TILE - 1)) // TILE, mask=g < num_groups)
    tl.store(tiles + g, tl.zeros_like(g), mask=g == 0)


@launched
def find_groups(group, tile_first, num_groups, count, STEPS: tl.constexpr, BT: tl.constexpr):
    """The group of each tile of ``count``. Grid (tiles / BT)."""
    tile = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    of = upper_bound(tile_first, num_groups + 1, tile, STEPS) - 1
    tl.store(group + tile, of, mask=tile < count)


@launched
def mark_touched(touched, group_first, num_entries, num_parts, BE: tl.constexpr):
    """touched[slice] = whether any part has a node with it. Grid (slices / BE)."""
    entry = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    here = entry < num_entries
    found = tl.zeros((BE,), dtype=tl.int64)
    for s in range(num_parts):
        group = group_first + (tl.zeros((), tl.int64) + s) * num_entries + entry
        found += tl.load(group + 1, mask=here, other=0) - tl.load(group, mask=here, other=0)
    tl.store(touched + entry, (found != 0).to(tl.int32), mask=here)


@launched
def copy_slices(
    out,
    cores,
    digit,
    entry_table,
    entry_row,
    cuts,
    parts,
    W: tl.constexpr,
    ELEMENT: tl.constexpr,
    BW: tl.constexpr,
):
    """out[n] = the slice of node n of level 1, of which ``cuts[parts]`` says how many there are.

    Grid (nodes, W / BW).
    """
    n = tl.program_id(0).to(tl.int64)
    if n >= tl.load(cuts + parts):
        return
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    entry = tl.load(digit + n).to(tl.int64)
    core = tl.load(cores + tl.load(entry_table + entry)).to(tl.pointer_type(ELEMENT))
    value = tl.load(core + tl.load(entry_row + entry) * W + w, mask=w < W)
    tl.store(out + n * W + w, value, mask=w < W)


@launched
def add_slices(grad, touched, source, digit, cuts, parts, W: tl.constexpr, BW: tl.constexpr):
    """grad[digit of node n] = source[n], of the ``cuts[parts]`` nodes of level 1.

    They rise by slice: one that parts cut has several, which are added up. Grid (nodes, W / BW).
    """
    n = tl.program_id(0).to(tl.int64)
    num_nodes = tl.load(cuts + parts)
    if n >= num_nodes:
        return
    entry = tl.load(digit + n).to(tl.int64)
    if tl.load(digit + n - 1, mask=n > 0, other=-1).to(tl.int64) == entry:
        return
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    tl.store(touched + entry, 1)
    total = tl.load(source + n * W + w, mask=w < W, other=0.0)
    more = n + 1
    while tl.load(digit + more, mask=more < num_nodes, other=-1).to(tl.int64) == entry:
        total += tl.load(source + more * W + w, mask=w < W, other=0.0)
        more += 1
    tl.store(grad + entry * W + w, total, mask=w < W)


@launched
def multiply(
    out,
    source,
    cores,
    nodes,
    parent,
    group_first,
    tile_first,
    tile_group,
    entry_table,
    entry_row,
    source_base,
    out_base,
    num_entries,
    part,
    FORWARD: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    ELEMENT: tl.constexpr,
    COMPUTE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    """Forward: out[node] [Q, N] = source[parent] [Q, K] times the node's slice [K, N].

    Otherwise the way back, out[node] [Q, N] = source[node] [Q, K] times the transpose of its slice [N, K].
    ``source`` and ``out`` start at rows ``source_base[0]`` and ``out_base[0]``. Grid (tiles, N / BN).
    """
    first_group = (tl.zeros((), tl.int64) + part) * num_entries
    tile = tl.load(tile_first + first_group) + tl.program_id(0)
    if tile >= tl.load(tile_first + (first_group + num_entries)):
        return
    group = tl.load(tile_group + tile).to(tl.int64)
    begin = tl.load(group_first + group)
    size = (tl.load(group_first + group + 1) - begin) * Q
    m = (tile - tl.load(tile_first + group)) * BM + tl.arange(0, BM)
    entry = group - first_group
    core = tl.multiple_of(tl.load(cores + tl.load(entry_table + entry)).to(tl.pointer_type(ELEMENT)), 16)
    core += tl.load(entry_row + entry) * (K * N)
    node = tl.load(nodes + begin + m // Q, mask=m < size, other=0).to(tl.int64)
    if FORWARD:
        at = tl.load(parent + node, mask=m < size, other=0).to(tl.int64) - tl.load(source_base)
    else:
        at = node - tl.load(source_base)
    at = (at * Q + m % Q) * K
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(source + at[:, None] + k[None, :], mask=(m < size)[:, None] & (k < K)[None, :], other=0.0)
        within = (k < K)[:, None] & (n < N)[None, :]
        if FORWARD:
            b = tl.load(core + k[:, None] * N + n[None, :], mask=within, other=0.0)
        else:
            b = tl.load(core + n[None, :] * K + k[:, None], mask=within, other=0.0)
        total = product(a.to(COMPUTE), b.to(COMPUTE), total, DOT, PRECISION)
    to = ((node - tl.load(out_base)) * Q + m % Q) * N
    tl.store(out + to[:, None] + n[None, :], total, mask=(m < size)[:, None] & (n < N)[None, :])


@launched
def slice_gradient(
    grad,
    source,
    grad_out,
    nodes,
    parent,
    group_first,
    source_base,
    grad_base,
    num_entries,
    part,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    """grad[slice] [K, N] += sum over the nodes of its group of source[parent]^T [K, Q] grad_out[node] [Q, N].

    One program owns each tile of a slice, so the sum's order is fixed. Grid (slices, K / BK, N / BN).
    """
    entry = tl.program_id(0).to(tl.int64)
    group = (tl.zeros((), tl.int64) + part) * num_entries + entry
    begin = tl.load(group_first + group)
    size = (tl.load(group_first + group + 1) - begin) * Q
    if size == 0:
        return
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    n = tl.program_id(2) * BN + tl.arange(0, BN)
    low = tl.load(source_base)
    low_out = tl.load(grad_base)
    total = tl.zeros((BK, BN) if DOT else (BK, BM, BN), dtype=tl.float32)
    for start in range(0, size, BM):
        m = start + tl.arange(0, BM)
        node = tl.load(nodes + begin + m // Q, mask=m < size, other=0).to(tl.int64)
        at = ((tl.load(parent + node, mask=m < size, other=0).to(tl.int64) - low) * Q + m % Q) * K
        to = ((node - low_out) * Q + m % Q) * N
        a = tl.load(source + at[None, :] + k[:, None], mask=(m < size)[None, :] & (k < K)[:, None], other=0.0)
        b = tl.load(
            grad_out + to[:, None] + n[None, :], mask=(m < size)[:, None] & (n < N)[None, :], other=0.0
        )
        if DOT:
            total = product(a.to(tl.float32), b, total, DOT, PRECISION)
        else:
            left, right = tl.broadcast(a.to(tl.float32)[:, :, None], b[None, :, :])
            total = tl.fma(left, right, total)
    if not DOT:
        # Once: threads that add up wait for each other.
        total = tl.sum(total, 1)
    address = grad + entry * (K * N) + k[:, None] * N + n[None, :]
    mask = (k < K)[:, None] & (n < N)[None, :]
    tl.store(address, tl.load(address, mask=mask, other=0.0) + total, mask=mask)
