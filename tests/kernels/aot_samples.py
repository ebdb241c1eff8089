"""Sample kernels whose costs are known, for the tests of the ahead-of-time report.

They are run in processes of their own: a process that interprets Triton kernels cannot compile any.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
import triton.language as tl

from recemb_kernels.aot.configuration import Configuration


@triton.jit
def gather_wide(out, weight, rows, count, D: tl.constexpr, BB: tl.constexpr) -> None:
    """64-bit throughout, through a loop that carries a pointer."""
    at = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    d = tl.arange(0, D)
    row = tl.load(rows + at, mask=at < count, other=0)
    total = tl.zeros((BB, D), tl.float32)
    source = weight + row[:, None] * D + d[None, :]
    for _ in range(4):
        total += tl.load(source)
        source += tl.load(rows) * D
    tl.store(out + at[:, None] * D + d[None, :], total, mask=(at < count)[:, None])


@triton.jit
def gather_narrow(out, weight, rows, count, D: tl.constexpr, BB: tl.constexpr) -> None:
    """Three narrow offsets: into ``rows`` and ``out`` of 32 bits, into ``weight`` widened too late."""
    at = tl.program_id(0) * BB + tl.arange(0, BB)
    d = tl.arange(0, D)
    row = tl.load(rows + at, mask=at < count, other=0)
    offset = (row.to(tl.int32)[:, None] * D + d[None, :]).to(tl.int64)
    value = tl.load(weight + offset)
    tl.store(out + (at[:, None] * D + d[None, :]), value, mask=(at < count)[:, None])


@triton.jit
def wander(out, tables, rows, ends, W: tl.constexpr) -> None:
    """64-bit through an early return, a search, a branch, a reduction, a table of addresses, tile indices."""
    n = tl.program_id(0).to(tl.int64)
    if n >= tl.load(ends):
        return
    table = tl.program_id(1)
    w = tl.program_id(2) * W + tl.arange(0, W)
    low = n * 0
    high = n + 5
    while low < high:
        middle = (low + high) // 2
        if tl.load(ends + middle) > n:
            high = middle
        else:
            low = middle + 1
    source = tl.load(tables + 3 * table + 1).to(tl.pointer_type(tl.float32))
    last = tl.max(tl.load(rows + n * W + w), 0)
    tl.store(out + last * W + w, tl.load(source + low * W + w))


@triton.jit
def wander_narrow(out, tables, rows, ends, W: tl.constexpr) -> None:
    """The same ways in 32 bits: narrow are the offsets into ``rows``, the table's address and ``out``."""
    n = tl.program_id(0)
    if n >= tl.load(ends):
        return
    w = tl.arange(0, W)
    low = n * 0
    high = tl.load(ends).to(tl.int32)
    at = n
    while low < high:
        at += W
        low += 1
    source = tl.load(tables + 3 * tl.program_id(1)).to(tl.pointer_type(tl.float32))
    for i in range(tl.load(rows + at).to(tl.int32)):
        source += i * W
        last = tl.max(w + i, 0)
        tl.store(out + last.to(tl.int64) + w, tl.load(source + w))


@triton.jit
def multiply(out, a, b, D: tl.constexpr) -> None:
    """One product of two D x D matrices on the tensor cores."""
    i = tl.arange(0, D)
    at = i[:, None] * D + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def hoard(out, source, W: tl.constexpr, N: tl.constexpr) -> None:
    """Holds N rows of W numbers, all alive until the end, in one warp: more than its registers."""
    w = tl.arange(0, W)
    total = tl.zeros((W,), tl.float32)
    held = ()
    for n in tl.static_range(N):
        held += (tl.load(source + n * W + w),)
    tl.debug_barrier()
    for n in tl.static_range(N):
        total += held[N - 1 - n] * total + held[n] * held[(n * 7 + 3) % N]
    tl.store(out + w, total)


def _configuration(
    function: Any, signature: dict[str, str], constants: dict[str, int], **more: Any
) -> Configuration:
    given: dict[str, Any] = {
        "kernel": f"samples.{function.__name__}",
        "dtype": "float32",
        "num_warps": 4,
        "num_stages": 2,
        "flops_per_lookup": 0.0,
        "bytes_per_lookup": 136.0,
        "min_occupancy": 0.25,
    }
    return Configuration(function=function, signature=signature, constants=constants, **{**given, **more})


def shipped() -> list[Configuration]:
    """All samples."""
    gather = {"out": "*fp32", "weight": "*fp32", "rows": "*i64", "count": "i64"}
    tile = {"D": 32, "BB": 64}
    walk = {"out": "*fp32", "tables": "*i64", "rows": "*i64", "ends": "*i64"}
    matrices = {"out": "*fp32", "a": "*bf16", "b": "*bf16"}
    return [
        _configuration(gather_wide, gather, tile, note="D=32"),
        _configuration(gather_narrow, gather, tile, note="D=32"),
        _configuration(gather_narrow, gather, tile, note="D=32, out small", small=("out",)),
        _configuration(wander, walk, {"W": 64}),
        _configuration(wander_narrow, walk, {"W": 64}),
        _configuration(multiply, matrices, {"D": 64}, dtype="bfloat16", flops_per_lookup=2.0 * 64**3),
        _configuration(hoard, {"out": "*fp32", "source": "*fp32"}, {"W": 512, "N": 40}, num_warps=1),
    ]


def further() -> list[Configuration]:
    """One sample more, which only a check compiles."""
    gather = {"out": "*fp32", "weight": "*fp32", "rows": "*i64", "count": "i64"}
    return [_configuration(gather_wide, gather, {"D": 16, "BB": 64}, note="D=16")]


if __name__ == "__main__":
    from recemb.cli.main import main
    from recemb_kernels.aot import registry

    registry.MODULES = ("aot_samples",)
    sys.exit(main(sys.argv[1:]))
