"""A table of a billion rows against one of a million: the same step, and how much memory it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bench.floor import floor, update_growth
from bench.guard import ROOT
from bench.hand_over import HandOver
from bench.ids import make_batches
from bench.measure import Seconds, percentiles, ratio
from bench.results import Row
from bench.session import case_bytes, describe
from bench.settings import BASE, FORWARD, OP, SCALE_RANK, TREE_OF_1G, TT, G, M, Setting, count
from bench.targets import SCALE_PEAK_BYTES, SCALE_RATIO
from bench.work import distinct_ids, touched_bytes, work
from bench.worker import Worker, alternate

_CASE, _PATHS = f"{TT}{SCALE_RANK}", (OP, FORWARD)


def measure_scale(rounds: int) -> tuple[list[Row], list[str]]:
    """The sizes alternately in a child process, where the peak memory is theirs alone.

    Beside them, the million's table looked up by batches with the billion's number of rows and prefixes
    (:func:`bench.ids.lay_tree`): what these cost, without more slices.

    Returns:
        The rows, Zipf ids in frequency order first; lines on the memory and on what the growth is made of.
    """
    rows = []
    worker = Worker(ROOT)
    try:
        for ids in ("zipf", "permuted"):
            rows += _sizes(worker, ids, rounds)
        peak = worker.peak_bytes()
    finally:
        worker.close()
    verdict = "met" if peak < SCALE_PEAK_BYTES else "missed"
    return [replace(row, peak_rss_bytes=peak) for row in rows], [
        f"peak memory of all above the imports: {peak / 1e6:,.0f} MB, "
        f"target < {SCALE_PEAK_BYTES / 1e6:,.0f} MB: {verdict}",
        _growth(rows),
    ]


def _sizes(worker: Worker, ids: str, rounds: int) -> list[Row]:
    settings = [replace(BASE, rows=(n,), ids=ids) for n in (M, G)]
    if ids == BASE.ids:
        settings.append(replace(BASE, rows=(M,), ids=TREE_OF_1G))
    keys = [f"{count(setting.rows[0])} {setting.ids}" for setting in settings]
    for key, setting in zip(keys, settings, strict=True):
        worker.build(key, setting, _CASE, _PATHS)
    apart = HandOver(worker.hand_over)
    apart()
    times = alternate([worker], [f"{key} {path}" for path in _PATHS for key in keys], rounds)
    apart()
    worker.drop()
    rows = []
    for path in _PATHS:
        (million,) = times[f"{keys[0]} {path}"]
        for key, setting in zip(keys, settings, strict=True):
            rows.append(_row(setting, path, times[f"{key} {path}"][0], million))
    return [replace(row, hand_over_ns=apart.median) for row in rows]


def _growth(measured: Sequence[Row]) -> str:
    """What a billion rows do more, what that costs at the machine's own speed, and the ratio that leaves."""
    settings = [replace(BASE, rows=(n,)) for n in (M, G)]
    batches = [make_batches(setting) for setting in settings]
    rows = [distinct_ids(BASE, made) for made in batches]
    flop = [work(_CASE, OP, s, made).flop for s, made in zip(settings, batches, strict=True)]
    touched = [touched_bytes(_CASE, s, made) for s, made in zip(settings, batches, strict=True)]
    arithmetic = (flop[1] - flop[0]) / (floor(BASE.dim).gemm * 1e9)
    slices = 1e6 * update_growth(*touched)
    million, _, tree = (row for row in measured if (row.path, row.ids != "permuted") == (OP, True))
    assert tree.ratio_like is not None
    return (
        f"a batch of the billion has {rows[1]:,.0f} distinct rows, of the million {rows[0]:,.0f}. At the "
        f"machine's own speed the billion's takes {1e6 * arithmetic:.0f} us more for "
        f"{flop[1] / 1e6:.0f} MFLOP instead of {flop[0] / 1e6:.0f} (as GEMM), and {slices:.0f} us more to "
        f"read and write {touched[1] / 1e6:.2f} MB of core slices instead of {touched[0] / 1e6:.2f} once "
        f"(in one block). With rows and prefixes as measured ({TREE_OF_1G}) and the slices at that speed: "
        f"{tree.ratio_like + slices / million.p50_us:.2f} x"
    )


def _row(setting: Setting, path: str, times: Seconds, million: Seconds) -> Row:
    spread = percentiles(times)
    growth = None if times is million else ratio(times, million)
    # The promise is made for a step and ids in frequency order; the others are reported beside it.
    bound = growth if (path, setting.ids) == (OP, BASE.ids) else None
    return Row(
        **describe(setting),
        distinct=None,
        case=f"{_CASE} N={count(setting.rows[0])}",
        path=path,
        table_bytes=case_bytes(_CASE, setting),
        rounds=len(times),
        p20_us=spread.p20,
        p50_us=spread.p50,
        p80_us=spread.p80,
        like="" if growth is None else f"{_CASE} N={count(M)}",
        ratio_like=growth,
        target="" if bound is None else f"<={SCALE_RATIO:g}",
        met=None if bound is None else bound <= SCALE_RATIO,
    )
