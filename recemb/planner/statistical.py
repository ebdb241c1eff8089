"""Statistical sharding: hot rows in HBM, warm rows in DDR, the others compressed, by how often each is read.

SCRec (arXiv 2504.00520) places rows by access statistics over tiers of memory and a tensor-train
tier with a mixed-integer programme. Here the tiers are those of this project, and the programme is solved by
Lagrange multipliers: with a price for each byte of HBM and of DDR every row's best tier is known at once, so
the dual is cheap and bounds the least time from below. The prices where the budgets bind give a placement,
which is filled up row by row; the result states how far above the bound it is.

A table whose rows all lie in HBM or DDR needs no compressed parameters, whose bytes in HBM it then saves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recemb.errors import PlanError
from recemb.id_maps.radix import ceil_div
from recemb.planner.least_hbm import least_hbm
from recemb.planner.tiers import Rows, TieredTable, TierPlan, Tiers
from recemb.units import size

_STEPS = 50


def place_rows(
    tables: Sequence[TieredTable], hbm: int, ddr: int, ranks: int = 1, reserved: float = 0.0
) -> TierPlan:
    """The fastest placement found within the bytes of all ranks together, and a bound.

    Args:
        hbm, ddr: bytes of one rank.
        reserved: part of them that is left free for everything but tables, in [0, 1).

    Raises:
        PlanError: no placement was found.
    """
    given, hbm, ddr = (hbm, ddr), unreserved(hbm, reserved) * ranks, unreserved(ddr, reserved) * ranks
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
        best = least_hbm(tables, ddr)
        least = ceil_div(sum(t.hbm for t in best), ranks)
        if sum(t.hbm for t in best) > hbm:
            kept = f" ({reserved:.0%} kept free)" if reserved else ""
            raise PlanError(
                f"no placement was found in {size(given[0])} of HBM and {size(given[1])} of DDR a rank{kept}"
                f": rows in HBM and compressed tables take {size(least)} a rank at least; give --hbm "
                f"{_to_leave(least, reserved)} or compress harder"
            )
        best = _fill(best, hbm, ddr)
    return TierPlan(tuple(best), bound)


def unreserved(num_bytes: int, reserved: float) -> int:
    """What of a rank's bytes tables may take."""
    return int((1 - reserved) * num_bytes)


def _to_leave(num_bytes: int, reserved: float) -> int:
    """The least storage of which so many bytes are free."""
    given = int(num_bytes / (1 - reserved))
    while unreserved(given, reserved) < num_bytes:
        given += 1
    return given


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
    counts, lookups = table.groups
    warm = lookups * table.warm_ns + price_ddr * table.row_bytes
    # Without them, each row is hot or warm; ties go to the tier that needs less.
    hot = lookups * table.hot_ns + price_hbm * table.row_bytes
    in_ddr = warm <= hot
    stored = Tiers(table, int(counts[~in_ddr].sum()), int(counts[in_ddr].sum()))
    stored_cost = float((np.minimum(hot, warm) * counts).sum())
    # With them, the first groups are hot, as many as are best: bytes are linear between the groups' ends.
    cold = lookups * table.cold_ns
    others = np.cumsum((np.minimum(warm, cold) * counts)[::-1])[::-1]
    cost = np.append(others, 0) + np.append(0, np.cumsum(lookups * table.hot_ns * counts))
    cost = cost + price_hbm * (table.compressed_bytes + table.hot_bytes_of_groups)
    first = int(cost.argmin())
    if stored_cost < cost[first]:
        return stored
    in_ddr = warm < cold
    return Tiers(table, int(counts[:first].sum()), int(counts[first:][in_ddr[first:]].sum()))


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
            after = _promoted(t, kind, _most(t, kind, t.hbm + free_hbm, t.ddr + free_ddr))
            if after == t:
                continue
            filled[i] = after
            free_hbm -= after.hbm - t.hbm
            free_ddr -= after.ddr - t.ddr
            moving = True
            break
    return filled


def _promoted(tiers: Tiers, kind: str, count: int) -> Tiers:
    """The same with the next rows one tier up."""
    if kind == "warm":
        return Tiers(tiers.table, tiers.hot, tiers.warm + count)
    return Tiers(tiers.table, tiers.hot + count, max(0, tiers.warm - count))


def _group(tiers: Tiers, kind: str) -> int:
    """How many rows of equal frequency are next for a tier."""
    at = tiers.hot if kind == "hot" else tiers.hot + tiers.warm
    source = tiers.warm if kind == "hot" and tiers.warm else tiers.cold
    return min(_rows_at(tiers.table, at)[1] - at, source)


def _most(tiers: Tiers, kind: str, hbm: int, ddr: int) -> int:
    """How many of these rows fit."""

    def fits(count: int) -> bool:
        after = _promoted(tiers, kind, count)
        return after.hbm <= hbm and after.ddr <= ddr

    low, high = 0, _group(tiers, kind)
    # The last of all rows takes the compressed parameters and the cache with it; before that, bytes grow.
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _steps(tiers: Tiers) -> list[tuple[float, str]]:
    """Gains a byte of the next rows up: into HBM, from DDR if rows lie there; and into DDR."""
    table, found = tiers.table, []
    source = table.warm_ns if tiers.warm else table.cold_ns
    if tiers.hot < table.num_rows and source > table.hot_ns:
        found.append((_gain(tiers, "hot", source - table.hot_ns), "hot"))
    if tiers.cold and table.cold_ns > table.warm_ns:
        found.append((_gain(tiers, "warm", table.cold_ns - table.warm_ns), "warm"))
    return [step for step in found if step[0] > 0]


def _gain(tiers: Tiers, kind: str, ns: float) -> float:
    """Of all rows of the next group together, each ``ns`` faster a look-up."""
    count = _group(tiers, kind)
    at = tiers.hot if kind == "hot" else tiers.hot + tiers.warm
    after = _promoted(tiers, kind, count)
    num_bytes = after.hbm - tiers.hbm if kind == "hot" else after.ddr - tiers.ddr
    return _rows_at(tiers.table, at)[0].lookups * count * ns / max(1, num_bytes)


def _rows_at(table: TieredTable, row: int) -> tuple[Rows, int]:
    """The group that a row is in, and where the group ends."""
    end = 0
    for rows in table.rows:
        end += rows.count
        if row < end:
            return rows, end
    raise IndexError(row)
