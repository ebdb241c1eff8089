"""As little HBM as tables of placed rows may take, for placements that hardly fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from recemb.planner.tiers import TieredTable, Tiers

# Of the knapsack.
_FEW_ROWS, _MOST_STATES = 8, 512


def least_hbm(tables: Sequence[TieredTable], ddr: int) -> list[Tiers]:
    """As little HBM as may be: a knapsack of whole tables in DDR, but one that takes what they leave.

    With rows of one size the least needs no more tables in parts; of small tables every part is tried.
    """
    best: list[Tiers] | None = None
    for last, table in enumerate(tables):
        front = [_State(0, 0, None)]
        for other in (*tables[:last], *tables[last + 1 :]):
            front = _front(state.then(tiers) for state in front for tiers in _parts(other))
            front = [state for state in front if state.ddr <= ddr]
        rest = [(state, min(table.num_rows, (ddr - state.ddr) // table.row_bytes)) for state in front]
        ends = [
            state.then(tiers)
            for state, warm in rest
            for tiers in (Tiers(table, table.num_rows - warm, warm), Tiers(table, 0, 0))
        ]
        placed = {t.table.name: t for t in min(ends, key=lambda state: state.hbm).tiers()}
        found = [placed[t.name] for t in tables]
        if best is None or sum(t.hbm for t in found) < sum(t.hbm for t in best):
            best = found
    assert best is not None
    return best


def _parts(table: TieredTable) -> list[Tiers]:
    """Compressed, or without compressed parameters and some of its rows in DDR."""
    rows = table.num_rows
    counts = range(rows + 1) if rows <= _FEW_ROWS else (0, rows)
    return [Tiers(table, 0, 0), *(Tiers(table, rows - warm, warm) for warm in counts)]


@dataclass(frozen=True)
class _State:
    """Some tables placed: their bytes, and the last of them after the others."""

    hbm: int
    ddr: int
    placed: tuple[_State, Tiers] | None

    def then(self, tiers: Tiers) -> _State:
        return _State(self.hbm + tiers.hbm, self.ddr + tiers.ddr, (self, tiers))

    def tiers(self) -> list[Tiers]:
        found, at = [], self.placed
        while at is not None:
            state, tiers = at
            found.append(tiers)
            at = state.placed
        return found


def _front(states: Iterable[_State]) -> list[_State]:
    """Those that no other beats in both kinds of bytes; of too many, an even choice."""
    front: list[_State] = []
    for state in sorted(states, key=lambda state: (state.ddr, state.hbm)):
        if not front or state.hbm < front[-1].hbm:
            front.append(state)
    if len(front) <= _MOST_STATES:
        return front
    return [front[k * (len(front) - 1) // (_MOST_STATES - 1)] for k in range(_MOST_STATES)]
