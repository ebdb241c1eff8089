"""A table of a billion rows against one of a million: the same step, and how much memory it takes."""

from __future__ import annotations

from dataclasses import replace

from bench.guard import ROOT
from bench.measure import Seconds, percentiles, ratio
from bench.results import Row
from bench.session import case_bytes, describe
from bench.settings import BASE, OP, TT, G, M, Setting, count
from bench.targets import SCALE_PEAK_BYTES, SCALE_RATIO
from bench.worker import Worker, alternate

_CASE = f"{TT}32"


def measure_scale(rounds: int) -> tuple[list[Row], str]:
    """Both sizes alternately in a child process, where the peak memory is theirs alone.

    Returns:
        The rows, Zipf ids in frequency order first, and a line on the memory.
    """
    rows = []
    worker = Worker(ROOT)
    try:
        for ids in ("zipf", "permuted"):
            rows += _pair(worker, ids, rounds)
        peak = worker.peak_bytes()
    finally:
        worker.close()
    verdict = "met" if peak < SCALE_PEAK_BYTES else "missed"
    return [replace(row, peak_rss_bytes=peak) for row in rows], (
        f"peak memory of both above the imports: {peak / 1e6:,.0f} MB, "
        f"target < {SCALE_PEAK_BYTES / 1e6:,.0f} MB: {verdict}"
    )


def _pair(worker: Worker, ids: str, rounds: int) -> list[Row]:
    settings = {n: replace(BASE, rows=(n,), ids=ids) for n in (M, G)}
    for n, setting in settings.items():
        worker.build(count(n), setting, _CASE, [OP])
    times = alternate([worker], [f"{count(n)} {OP}" for n in settings], rounds)
    (million,), (billion,) = times.values()
    worker.drop()
    return [_row(settings[M], million, million), _row(settings[G], billion, million)]


def _row(setting: Setting, times: Seconds, million: Seconds) -> Row:
    spread = percentiles(times)
    growth = ratio(times, million) if setting.rows == (G,) else None
    # The promise is made for ids in frequency order; permuted ones are reported beside it.
    bound = growth if setting.ids == BASE.ids else None
    return Row(
        **describe(setting),
        distinct=None,
        case=f"{_CASE} N={count(setting.rows[0])}",
        path=OP,
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
