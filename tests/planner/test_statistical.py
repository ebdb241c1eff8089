"""Statistical sharding against every placement there is."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.errors import DataError, PlanError
from recemb.planner.frequencies import row_frequencies
from recemb.planner.statistical import place_rows
from recemb.planner.tiers import Rows, TieredTable


def time_of(table: TieredTable, tiers: tuple[int, ...]) -> float:
    """Row by row: tier 0 hot, 1 warm, 2 cold."""
    ns = (table.hot_ns, table.warm_ns, table.cold_ns)
    each = [rows.lookups for rows in table.rows for _ in range(rows.count)]
    return sum(lookups * ns[tier] for lookups, tier in zip(each, tiers, strict=True))


def best(tables: list[TieredTable], hbm: int, ddr: int) -> float:
    """The least time over all assignments of rows to tiers."""
    least = math.inf
    for every in product(*(product((0, 1, 2), repeat=table.num_rows) for table in tables)):
        used_hbm = used_ddr = 0
        for table, tiers in zip(tables, every, strict=True):
            hot = tiers.count(0)
            cached = hot and 2 in tiers and table.cached_bytes
            # A corner for every number of rows, here.
            used_hbm += dict(table.cached_bytes)[hot] if cached else hot * table.row_bytes
            used_hbm += table.compressed_bytes if 2 in tiers else 0
            used_ddr += tiers.count(1) * table.row_bytes
        if used_hbm <= hbm and used_ddr <= ddr:
            least = min(least, sum(map(time_of, tables, every)))
    return least


@st.composite
def a_table(draw: st.DrawFn, name: str) -> TieredTable:
    lookups = sorted(draw(st.lists(st.integers(0, 20), min_size=1, max_size=3)), reverse=True)
    hot = draw(st.integers(1, 3))
    warm = hot + draw(st.integers(0, 6))
    row_bytes = draw(st.integers(1, 4))
    more = sorted(draw(st.lists(st.integers(0, 6), min_size=len(lookups), max_size=len(lookups))))
    corners = tuple((n, n * row_bytes + extra) for n, extra in enumerate(more, 1))
    return TieredTable(
        name,
        tuple(Rows(1, float(n)) for n in lookups),
        row_bytes=row_bytes,
        compressed_bytes=draw(st.integers(0, 3)),
        hot_ns=float(hot),
        warm_ns=float(warm),
        cold_ns=float(draw(st.integers(1, 10))),
        cached_bytes=draw(st.sampled_from([(), corners])),
    )


@settings(max_examples=150)
@given(
    st.integers(1, 2).flatmap(lambda n: st.tuples(*(a_table(f"t{k}") for k in range(n)))),
    st.integers(0, 14),
    st.integers(0, 10),
)
def test_within_the_stated_gap_of_the_best(tables: tuple[TieredTable, ...], hbm: int, ddr: int) -> None:
    least = best(list(tables), hbm, ddr)
    try:
        plan = place_rows(tables, hbm, ddr)
    except PlanError:
        assert least == math.inf
        return
    assert sum(tiers.hbm for tiers in plan.tiers) <= hbm
    assert sum(tiers.ddr for tiers in plan.tiers) <= ddr
    assert plan.bound_ns <= least * (1 + 1e-6) + 1e-9
    assert plan.ns >= least * (1 - 1e-9)
    # What a bound and greedy filling leave open is a row or a table's parameters.
    most = max(table.rows[0].lookups * max(table.cold_ns, table.warm_ns) for table in tables)
    assert plan.ns <= least + 3 * most + 1e-9


def zipf_table(name: str, rows: int, lookups: float, cold: float = 20.0) -> TieredTable:
    weights = [1 / (k + 1) for k in range(rows)]
    total = sum(weights)
    return TieredTable(
        name, tuple(Rows(1, lookups * w / total) for w in weights), 64, 100, hot_ns=1, warm_ns=8, cold_ns=cold
    )


def test_many_rows_leave_hardly_a_gap() -> None:
    tables = [zipf_table("a", 600, 1000), zipf_table("b", 300, 4000), zipf_table("c", 50, 10)]
    plan = place_rows(tables, 200 * 64, 300 * 64)
    assert plan.gap < 0.005
    by_name = {tiers.table.name: tiers for tiers in plan.tiers}
    assert by_name["b"].hot > by_name["a"].hot > by_name["c"].hot
    assert sum(tiers.ddr for tiers in plan.tiers) > 290 * 64


def test_with_room_for_all_everything_is_hot() -> None:
    tables = [zipf_table("a", 200, 1000), zipf_table("b", 50, 40)]
    plan = place_rows(tables, 250 * 64, 0)
    assert [(tiers.hot, tiers.warm, tiers.cold) for tiers in plan.tiers] == [(200, 0, 0), (50, 0, 0)]
    assert plan.gap == pytest.approx(0, abs=1e-9)


def test_ddr_is_left_alone_where_compressed_rows_are_faster() -> None:
    plan = place_rows([zipf_table("a", 200, 1000, cold=5)], 50 * 64, 10**6)
    assert plan.tiers[0].warm == 0
    assert plan.tiers[0].hot == (50 * 64 - 100) // 64


def test_compressed_tables_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PlanError, match=r"--hbm 200"):
        place_rows([zipf_table("a", 200, 10), zipf_table("b", 200, 10)], 150, 0)


def test_a_table_partly_in_hbm_needs_no_compressed_parameters() -> None:
    plan = place_rows([TieredTable("t", (Rows(10, 1.0),), 100, 500, 1, 2, 9)], 100, 950)
    assert (plan.tiers[0].hot, plan.tiers[0].warm) == (1, 9)


def test_tables_are_chosen_for_ddr_as_in_a_knapsack() -> None:
    """The first saves most HBM a byte, and leaves no room for the other two."""
    tables = [
        TieredTable(f"t{k}", (Rows(rows, 1.0),), 100, compressed, 1, 2, 9)
        for k, (rows, compressed) in enumerate([(6, 400), (5, 300), (5, 300)])
    ]
    plan = place_rows(tables, 400, 1000)
    assert sum(tiers.hbm for tiers in plan.tiers) <= 400
    assert sum(tiers.ddr for tiers in plan.tiers) <= 1000


def test_the_hbm_that_is_named_is_of_a_rank() -> None:
    tables = [zipf_table("a", 200, 10), zipf_table("b", 200, 10), zipf_table("c", 200, 10)]
    with pytest.raises(PlanError, match=r"in 10 B of HBM .* --hbm 75 "):
        place_rows(tables, 10, 0, ranks=4)
    assert place_rows(tables, 75, 0, ranks=4).tiers


@settings(max_examples=60)
@given(st.integers(100, 10**9), st.sampled_from([0.0, 0.15, 0.3, 0.9]))
def test_the_storage_that_is_named_is_the_least(num_bytes: int, reserved: float) -> None:
    tables = [TieredTable("t", (Rows(num_bytes, 1.0),), 1, num_bytes, 1, 2, 9)]
    with pytest.raises(PlanError) as refused:
        place_rows(tables, 1, 0, 3, reserved)
    needed = int(str(refused.value).partition("--hbm ")[2].split()[0])
    assert place_rows(tables, needed, 0, 3, reserved).tiers
    with pytest.raises(PlanError):
        place_rows(tables, needed - 1, 0, 3, reserved)


@pytest.mark.parametrize("reserved", [0.25, 0.5])
def test_what_is_reserved_stays_free(reserved: float) -> None:
    tables = [zipf_table("a", 600, 1000), zipf_table("b", 300, 4000)]
    plan = place_rows(tables, 200 * 64, 300 * 64, reserved=reserved)
    assert sum(tiers.hbm for tiers in plan.tiers) <= (1 - reserved) * 200 * 64
    assert sum(tiers.ddr for tiers in plan.tiers) <= (1 - reserved) * 300 * 64
    same = place_rows(tables, round((1 - reserved) * 200 * 64), round((1 - reserved) * 300 * 64))
    assert plan == same


FEATURE = {
    "name": "cat_0",
    "num_embeddings": 100,
    "top_share": {"1": 0.4, "10": 0.8, "100": 1.0},
    "count_histogram": [
        {"min_count": 4, "rows": 60, "lookups": 300},
        {"min_count": 32, "rows": 30, "lookups": 1700},
        {"min_count": 256, "rows": 9, "lookups": 8000},
    ],
}


def test_frequencies_of_a_prepared_feature() -> None:
    groups = row_frequencies(FEATURE, lookups=1000, train_rows=10_000)
    assert sum(rows.count for rows in groups) == 100
    assert sum(rows.count * rows.lookups for rows in groups) == pytest.approx(1000)
    each = [rows.lookups for rows in groups]
    assert each == sorted(each, reverse=True)
    assert groups[0] == Rows(1, 400.0)
    # 39 tokens of 32 and more, with the out-of-vocabulary row: 97 % of the look-ups.
    assert sum(rows.count * rows.lookups for rows in groups[:3]) == pytest.approx(970)


@pytest.mark.parametrize("broken", [{}, {**FEATURE, "top_share": 3}, {**FEATURE, "count_histogram": [{}]}])
def test_damaged_statistics(broken: dict[str, object]) -> None:
    with pytest.raises(DataError, match="damaged"):
        row_frequencies(broken, 1, 1)
