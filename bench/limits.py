"""What a missed target asks for, beside what the machine itself takes for the work."""

from __future__ import annotations

from collections.abc import Sequence

from bench.results import Row
from bench.settings import EMPTY, OP, TLTORCH, TT


def missed_lines(rows: Sequence[Row]) -> list[str]:
    """A line for each missed target, and one on what it asks for where that is known.

    The arithmetic is that of :mod:`bench.work` at the speed of a matrix product, its bytes are taken for rows
    at random: a step could hide one behind the other, but not the fixed cost of a step behind either.
    """
    empty = next((row.p50_us for row in rows if (row.case, row.path) == (EMPTY, OP)), None)
    lines = []
    for row in rows:
        if row.met is not False:
            continue
        lines.append(f"missed: {row.case} {row.path} [{row.setting}]")
        ours = _ours(row, rows)
        ratio = row.ratio_like if row.target.startswith(">=") else row.ratio_tbe
        if ours is None or not ratio or not (ours.gemm_gflop_s and ours.gather_gbyte_s):
            continue
        bound = float(row.target[2:])
        asked = ours.p50_us * (ratio / bound if row.target.startswith(">=") else bound / ratio)
        arithmetic = ours.p50_us * (ours.gflop_s or 0) / ours.gemm_gflop_s
        read = ours.p50_us * (ours.gbyte_s or 0) / ours.gather_gbyte_s
        fixed = "" if empty is None else f", a step that computes nothing {empty:,.0f}"
        lines.append(
            f"  took {ours.p50_us:,.0f} us, {asked:,.0f} are asked for: at the machine's own speed its "
            f"arithmetic takes {arithmetic:,.0f}, its bytes {read:,.0f}{fixed}"
        )
    return lines


def _ours(row: Row, rows: Sequence[Row]) -> Row | None:
    """The step that the target of a row asks to be fast."""
    if not row.case.startswith(TLTORCH):
        return row
    of = (TT + row.case.removeprefix(TLTORCH), row.path, row.setting)
    return next((own for own in rows if (own.case, own.path, own.setting) == of), None)
