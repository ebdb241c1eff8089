"""Statistical sharding: hot rows in HBM, warm rows in DDR, the others compressed, by how often each is read.

SCRec (arXiv 2504.00520) places rows by access statistics over tiers of memory and a tensor-train
tier with a mixed-integer programme. Here the tiers are those of this project, and the programme is solved by
Lagrange multipliers: with a price for each byte of HBM and of DDR every row's best tier is known at once, so
the dual is cheap and bounds the least time from below. The prices where the budgets bind give a placement,
which is filled up row by row; the result states how far above the bound it is.

A table whose rows all lie in HBM or DDR needs no compressed parameters, whose bytes in HBM it then saves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from recemb.errors import PlanError
from recemb.id_maps.radix import ceil_div
from recemb.planner.report import size

_STEPS = 50
# Of the knapsack for placements that hardly fit.
_FEW_ROWS, _MOST_STATES = 8, 512


@dataclass(frozen=True)
class Rows:
    """Rows of equal frequency.

    Attributes:
        count: how many.
        lookups: of each in a step.
    """

    count: int
    lookups: float


@dataclass(frozen=True)
class TieredTable:
    """A table to be placed by rows.

    Attributes:
        rows: most frequent first.
        row_bytes: of an uncompressed row.
        compressed_bytes: of its parameters when any row is left to them.
        hot_ns, warm_ns, cold_ns: of one look-up in HBM, in DDR, and from the compressed parameters.
    """

    name: str
    rows: tuple[Rows, ...]
    row_bytes: int
    compressed_bytes: int
    hot_ns: float
    warm_ns: float
    cold_ns: float

    @property
    def num_rows(self) -> int:
        return sum(rows.count for rows in self.rows)

    def ns(self, hot: int, warm: int) -> float:
        """Expected time of a step's look-ups with the first rows hot and the next warm."""
        total, start = 0.0, 0
        for rows in self.rows:
            end = start + rows.count
            in_hot = max(0, min(hot, end) - start)
            in_warm = max(0, min(hot + warm, end) - start) - in_hot
            in_cold = rows.count - in_hot - in_warm
            total += rows.lookups * (in_hot * self.hot_ns + in_warm * self.warm_ns + in_cold * self.cold_ns)
            start = end
        return total


@dataclass(frozen=True)
class Tiers:
    """Where a table's rows lie: the first ``hot``, the next ``warm``, and the others compressed."""

    table: TieredTable
    hot: int
    warm: int

    @property
    def cold(self) -> int:
        return self.table.num_rows - self.hot - self.warm

    @property
    def hbm(self) -> int:
        """Bytes of hot rows, and of compressed parameters when rows are left to them."""
        return self.hot * self.table.row_bytes + (self.table.compressed_bytes if self.cold else 0)

    @property
    def ddr(self) -> int:
        return self.warm * self.table.row_bytes

    @property
    def ns(self) -> float:
        return self.table.ns(self.hot, self.warm)


@dataclass(frozen=True)
class TierPlan:
    """A placement of all tables.

    Attributes:
        bound_ns: no placement within the budgets is faster.
    """

    tiers: tuple[Tiers, ...]
    bound_ns: float

    @property
    def ns(self) -> float:
        return sum(tiers.ns for tiers in self.tiers)

    @property
    def gap(self) -> float:
        """How far above the bound, as a fraction."""
        return max(0.0, self.ns / self.bound_ns - 1) if self.bound_ns > 0 else 0.0


def place_rows(tables: Sequence[TieredTable], hbm: int, ddr: int, ranks: int = 1) -> TierPlan:
    """The fastest placement found within the bytes of all ranks together, and a bound.

    Args:
        hbm, ddr: bytes of one rank.

    Raises:
        PlanError: no placement was found.
    """
    hbm, ddr = hbm * ranks, ddr * ranks
    bound = 0.0
    best: list[Tiers] | None = None
    low, high = -60.0, 20.0
    for price_hbm in [0.0, *(None,) * _STEPS]:
        middle = (low + high) / 2
        value, chosen = _best_ddr(tables, hbm, ddr, 2.0**middle if price_hbm is None else price_hbm)
        bound = max(bound, value)
        within = chosen is not None and sum(t.hbm for t in chosen) <= hbm
        if within and chosen is not None:
            filled = _fill(chosen, hbm, ddr)
            if best is None or sum(t.ns for t in filled) < sum(t.ns for t in best):
                best = filled
            if price_hbm is not None:
                break
        if price_hbm is None:
            low, high = (low, middle) if within else (middle, high)
    if best is None:
        best = _least_hbm(tables, ddr)
        least = ceil_div(sum(t.hbm for t in best), ranks)
        if sum(t.hbm for t in best) > hbm:
            raise PlanError(
                f"no placement was found in {size(hbm // ranks)} of HBM and {size(ddr // ranks)} of DDR a "
                f"rank: rows in HBM and compressed tables take {size(least)} a rank at least; give --hbm "
                f"{least} or compress harder"
            )
        best = _fill(best, hbm, ddr)
    return TierPlan(tuple(best), bound)


def _best_ddr(
    tables: Sequence[TieredTable], hbm: int, ddr: int, price: float
) -> tuple[float, list[Tiers] | None]:
    """The dual's best value over prices of DDR, and the placement at the least price that keeps to it."""
    best, within = 0.0, None
    low, high = -60.0, 20.0
    for step in range(_STEPS):
        middle = (low + high) / 2
        other = 0.0 if step == 0 else 2.0**middle
        chosen = [_cheapest(table, price, other) for table in tables]
        used_hbm, used_ddr = sum(t.hbm for t in chosen), sum(t.ddr for t in chosen)
        best = max(best, sum(t.ns for t in chosen) + price * (used_hbm - hbm) + other * (used_ddr - ddr))
        if used_ddr <= ddr:
            within, high = chosen, middle
            if step == 0:
                break
        elif step:
            low = middle
    return best, within


def _cheapest(table: TieredTable, price_hbm: float, price_ddr: float) -> Tiers:
    """The best tier of every row at these prices, with and without the compressed parameters."""
    counts = np.asarray([rows.count for rows in table.rows], np.int64)
    lookups = np.asarray([rows.lookups for rows in table.rows])
    hot = lookups * table.hot_ns + price_hbm * table.row_bytes
    warm = lookups * table.warm_ns + price_ddr * table.row_bytes
    cold = lookups * table.cold_ns
    # Ties go to the tier that needs less: cold, then warm.
    with_cold = np.where(cold <= np.minimum(hot, warm), 2, np.where(warm <= hot, 1, 0))
    stored = np.where(warm <= hot, 1, 0)
    options = []
    for tier in (with_cold, stored):
        cost = float((np.choose(tier, [hot, warm, cold]) * counts).sum())
        tiers = Tiers(table, int(counts[tier == 0].sum()), int(counts[tier == 1].sum()))
        options.append((cost + price_hbm * (table.compressed_bytes if tiers.cold else 0), tiers))
    return min(options, key=lambda pair: pair[0])[1]


def _least_hbm(tables: Sequence[TieredTable], ddr: int) -> list[Tiers]:
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


def _fill(tiers: Sequence[Tiers], hbm: int, ddr: int) -> list[Tiers]:
    """Promote rows into what is left, the greatest gain a byte first."""
    filled = list(tiers)
    free_hbm = hbm - sum(t.hbm for t in filled)
    free_ddr = ddr - sum(t.ddr for t in filled)
    moving = True
    while moving:
        moving = False
        steps = [(gain, i, kind) for i, t in enumerate(filled) for gain, kind in _steps(t)]
        for _, i, kind in sorted(steps, key=lambda step: -step[0]):
            t = filled[i]
            room = (free_ddr if kind == "warm" else free_hbm) // t.table.row_bytes
            at = t.hot if kind == "hot" else t.hot + t.warm
            count = min(room, _left_in_group(t.table, at), t.warm if kind == "hot" and t.warm else t.cold)
            if count < 1:
                continue
            if kind == "warm":
                filled[i] = Tiers(t.table, t.hot, t.warm + count)
            else:
                filled[i] = Tiers(t.table, t.hot + count, max(0, t.warm - count))
            free_hbm -= filled[i].hbm - t.hbm
            free_ddr -= filled[i].ddr - t.ddr
            moving = True
            break
    return filled


def _steps(tiers: Tiers) -> list[tuple[float, str]]:
    """Gains a byte of the next row up: into HBM, from DDR if rows lie there; and into DDR."""
    table, found = tiers.table, []
    source = table.warm_ns if tiers.warm else table.cold_ns
    if tiers.hot < table.num_rows and source > table.hot_ns:
        found.append((_lookups(table, tiers.hot) * (source - table.hot_ns) / table.row_bytes, "hot"))
    if tiers.cold and table.cold_ns > table.warm_ns:
        at = tiers.hot + tiers.warm
        found.append((_lookups(table, at) * (table.cold_ns - table.warm_ns) / table.row_bytes, "warm"))
    return [step for step in found if step[0] > 0]


def _group(table: TieredTable, row: int) -> tuple[Rows, int]:
    """The group that a row is in, and where the group ends."""
    end = 0
    for rows in table.rows:
        end += rows.count
        if row < end:
            return rows, end
    raise IndexError(row)


def _lookups(table: TieredTable, row: int) -> float:
    return _group(table, row)[0].lookups


def _left_in_group(table: TieredTable, row: int) -> int:
    return _group(table, row)[1] - row
