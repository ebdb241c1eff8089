"""What a missed target asks for, beside what the machine itself takes for the work."""

from __future__ import annotations

from collections.abc import Sequence

from bench.results import Row
from bench.settings import AT_HAND, OP, TLTORCH, TT


def missed_lines(rows: Sequence[Row]) -> list[str]:
    """A line for each missed target, and one on what it asks for where that is known.

    That is no proof that more is impossible: arithmetic may hide behind memory, and caches may hold weights
    (:mod:`bench.work`, :mod:`bench.floor`). The fixed costs of a step are not in it, nor is what any method
    does with its ids. Both are in the step of an uncompressed table of which a batch asks for as many rows,
    side by side: one of ours, with nothing to compute or to hash, and little to fetch from memory. That step,
    the arithmetic and the weights as a copy in one block are also added up: what they would take one after
    the other, each at the best that was seen here.
    """
    lines = []
    for row in rows:
        if row.met is not False:
            continue
        lines.append(f"missed: {row.case} {row.path} [{row.setting}]")
        ours = _ours(row, rows)
        ratio = row.ratio_like if row.target.startswith(">=") else row.ratio_tbe
        if ours is None or not ratio or ours.memory_us is None or not ours.gemm_gflop_s:
            continue
        bound = float(row.target[2:])
        asked = ours.p50_us * (ratio / bound if row.target.startswith(">=") else bound / ratio)
        arithmetic = _arithmetic_us(ours)
        lines.append(
            f"  took {ours.p50_us:,.0f} us, {asked:,.0f} are asked for: at the machine's own speed its "
            f"arithmetic takes {arithmetic:,.0f}, its bytes {ours.memory_us:,.0f}{_at_hand(ours, rows)}"
        )
    return lines


def _ours(row: Row, rows: Sequence[Row]) -> Row | None:
    """The step that the target of a row asks to be fast."""
    if not row.case.startswith(TLTORCH):
        return row
    return _find(rows, TT + row.case.removeprefix(TLTORCH), row.path, row.setting)


def _arithmetic_us(ours: Row) -> float:
    return ours.p50_us * (ours.gflop_s or 0) / (ours.gemm_gflop_s or 1)


def _copied_weights_us(ours: Row) -> float:
    """Of the bytes that ``memory_us`` takes to be at random places, as a copy; 0 where that is not known."""
    if not (ours.memory_us and ours.gbyte_s and ours.copy_gbyte_s and ours.gather_gbyte_s):
        return 0.0
    copied = ours.p50_us * ours.gbyte_s / ours.copy_gbyte_s
    slower = ours.copy_gbyte_s / ours.gather_gbyte_s
    return max(0.0, (ours.memory_us - copied) / (slower - 1)) if slower > 1 else copied


def _at_hand(ours: Row, rows: Sequence[Row]) -> str:
    least = _find(rows, AT_HAND, OP, ours.setting)
    if least is None:
        return ""
    together = least.p50_us + _arithmetic_us(ours) + _copied_weights_us(ours)
    return (
        f"; a step on {AT_HAND}, uncompressed, took {least.p50_us:,.0f}, with that arithmetic and these "
        f"weights copied in one block {together:,.0f}"
    )


def _find(rows: Sequence[Row], *wanted: str) -> Row | None:
    """The row of a case, path and setting."""
    return next((row for row in rows if (row.case, row.path, row.setting) == wanted), None)
