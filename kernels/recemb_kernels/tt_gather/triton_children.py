"""Triton kernels of tensor-train tables: the way back from rows to the products that they are made of.

A row's gradient is [Q, N], Q = q_1 .. q_(d-1) and N = q_d; its share of the gradient of its parent's product
is that times the transpose of its slice, [Q, K], K = R_(d-1). Where a share is narrow, :func:`multiply` makes
those of a micro-batch, slice by slice; else they are computed as they are added up, and never stored.
"""

from __future__ import annotations

import triton.language as tl

from recemb_kernels.triton_frame.elements import launched


@launched
def sum_children(
    out,
    parts,
    source,
    cores,
    child,
    parent,
    entry,
    entry_table,
    entry_row,
    cuts,
    node_cuts,
    SHARES: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    ELEMENT: tl.constexpr,
    PIECE: tl.constexpr,
    BC: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
):
    """The way back from rows: out[node] [Q, K] = the sum over a node's rows of their shares: source[row] with
    SHARES, else source[row] [Q, N] times the transpose [N, K] of the row's slice, ``entry[row]``.

    Of the rows from ``cuts[0]`` to ``cuts[1]``, the first of which ``source`` starts at; ``out`` starts at
    node ``node_cuts[0]``, and has the sum of a node's rows before these, if it has such. The loads of BC rows
    are under way at once.

    Every PIECE rows a node that goes on is cut: ``parts[p]`` gets the sum of its rows from the p-th cut to
    the next, which ``join_children`` adds. Grid (any, K / BK): programs share nodes and cuts out among them,
    as the host knows but a bound of how many there are.
    """
    base = tl.load(cuts)
    past = tl.load(cuts + 1)
    if base == past:
        return
    low = tl.load(parent + base).to(tl.int64)
    num_nodes = tl.load(parent + past - 1).to(tl.int64) - low + 1
    of_out = tl.load(node_cuts)
    q = tl.arange(0, BQ)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    to = q[:, None] * K + k[None, :]
    mask = (q < Q)[:, None] & (k < K)[None, :]
    work = tl.program_id(0).to(tl.int64)
    while work < num_nodes + (past - base + (PIECE - 1)) // PIECE:
        piece = work - num_nodes
        whole = piece < 0
        cut = base + piece * PIECE
        node = tl.where(whole, low + work, tl.load(parent + cut, mask=whole == 0, other=0).to(tl.int64))
        opened = tl.load(child + node).to(tl.int64)
        begin = tl.maximum(opened, base)
        first = tl.where(whole, begin, cut)
        end = first + PIECE - (first - base) % PIECE
        end = tl.minimum(end, tl.minimum(past, tl.load(child + node + 1).to(tl.int64)))
        # A cut where a node begins cuts none.
        end = tl.where(whole | (begin < cut), end, first)
        stored = mask & (first < end)
        stride: tl.constexpr = Q * (K if SHARES else N)
        to_source = (first - base) * stride
        total = tl.zeros((BQ, BK), dtype=tl.float32)
        while first < end:
            for i in tl.static_range(BC):
                inside = first + i < end
                if SHARES:
                    total += tl.load(source + (to_source + i * stride + to), mask=inside & mask, other=0.0)
                else:
                    of = tl.load(entry + first + i, mask=inside, other=0).to(tl.int64)
                    core = tl.load(cores + tl.load(entry_table + of)).to(tl.pointer_type(ELEMENT))
                    core += tl.load(entry_row + of) * (K * N)
                    share = tl.zeros((BQ, BK), dtype=tl.float32)
                    for n in tl.static_range(N):
                        left = source + (to_source + i * stride) + (q * N + n)
                        left = tl.load(left, mask=inside & (q < Q), other=0.0)
                        right = tl.load(core + (k * N + n), mask=inside & (k < K), other=0.0).to(tl.float32)
                        left, right = tl.broadcast(left[:, None], right[None, :])
                        share = tl.fma(left, right, share)
                    total += share
            first += BC
            to_source += BC * stride
        at = out + ((node - of_out) * (Q * K) + to)
        total += tl.load(at, mask=stored & whole & (opened < base), other=0.0)
        tl.store(at, total, mask=stored & whole)
        tl.store(parts + (piece * (Q * K) + to), total, mask=stored & (whole == 0))
        work += tl.num_programs(0)


@launched
def join_children(
    out,
    parts,
    child,
    parent,
    cuts,
    node_cuts,
    W: tl.constexpr,
    PIECE: tl.constexpr,
    BC: tl.constexpr,
    BW: tl.constexpr,
):
    """out[node] [W] += the parts of a node that ``sum_children`` cut, one after the other.

    By the program of its first cut; the loads of BC parts are under way at once. Grid (rows / PIECE, W / BW).
    """
    base = tl.load(cuts)
    past_rows = tl.load(cuts + 1)
    piece = tl.program_id(0).to(tl.int64)
    cut = base + piece * PIECE
    if cut >= past_rows:
        return
    node = tl.load(parent + cut).to(tl.int64)
    begin = tl.maximum(tl.load(child + node).to(tl.int64), base)
    if (begin == cut) | (begin < cut - PIECE):
        return
    end = tl.minimum(past_rows, tl.load(child + node + 1).to(tl.int64))
    past = piece + (end - cut + (PIECE - 1)) // PIECE
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    at = out + ((node - tl.load(node_cuts)) * W + w)
    total = tl.load(at, mask=w < W, other=0.0)
    while piece < past:
        for i in tl.static_range(BC):
            part = parts + ((piece + i) * W + w)
            total += tl.load(part, mask=(piece + i < past) & (w < W), other=0.0)
        piece += BC
    tl.store(at, total, mask=w < W)
