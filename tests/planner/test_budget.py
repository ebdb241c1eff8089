"""``--compress_rate R`` alone: settings that meet the budget, or a sentence that says why not."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.backends import backend_of
from recemb.errors import ConfigError
from recemb.planner.budget import METHODS, BudgetedTables, compress
from recemb.spec import Dense, TableSpec, TensorTrain

CARDINALITIES = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
COMPRESSING = [method for method in METHODS if method != "dense"]


def tables_of(rows: tuple[int, ...], dims: tuple[int, ...] = (16,)) -> list[TableSpec]:
    return [
        TableSpec(name=f"t{k}", num_embeddings=n, embedding_dim=dims[k % len(dims)])
        for k, n in enumerate(rows)
    ]


def check(tables: list[TableSpec], result: BudgetedTables, method: str, rate: float, threshold: int) -> None:
    """What holds for every budget."""
    report = result.memory
    assert [t.name for t in result.tables] == [t.name for t in tables]
    assert [t.num_embeddings for t in result.tables] == [t.num_embeddings for t in tables]
    assert [t.embedding_dim for t in result.tables] == [t.embedding_dim for t in tables]
    assert result.compress_rate == rate
    for before, after, record in zip(tables, result.tables, report, strict=True):
        assert after.compression.method in (method, "dense")
        if before.num_embeddings <= threshold:
            assert isinstance(after.compression, Dense)
        assert record.dense_bytes == before.num_embeddings * before.embedding_dim * 4
        if method != "robe":
            assert record.num_bytes <= record.dense_bytes
    assert report.total.num_bytes <= report.total.dense_bytes
    miss = abs(rate / report.total.ratio - 1)
    if result.shortfall is None:
        assert miss <= 0.05
    else:
        assert miss > 0.05
        assert method in result.shortfall
        assert f"instead of {rate:g}x" in result.shortfall
        assert f"{report.total.num_bytes:,}" in result.shortfall


@pytest.mark.parametrize("rate", [2, 10, 100, 1000])
@pytest.mark.parametrize("method", COMPRESSING)
def test_kaggle(method: str, rate: float) -> None:
    tables = tables_of(CARDINALITIES)
    result = compress(tables, method, rate)
    check(tables, result, method, rate, 200)
    # A train of the largest rank is smaller than half a table; one column is 16x here.
    if method in ("robe", "qr") or (method == "tt" and rate >= 10) or (method == "md" and rate <= 10):
        assert result.shortfall is None


def test_mixed_dimensions_cannot_go_below_one_column() -> None:
    result = compress(tables_of(CARDINALITIES), "md", 1000)
    assert result.shortfall is not None
    assert result.memory.total.ratio == pytest.approx(16, rel=0.01)
    assert "least" in result.shortfall
    assert "take tt or robe" in result.shortfall
    assert "'t2'" in result.shortfall


@pytest.mark.parametrize(
    ("method", "rows", "rate", "threshold", "advice"),
    [
        ("md", (150, 5000), 20, 200, "lower method_threshold, or take tt or robe, which shrink further"),
        ("qr", (5000,), 100, 0, "take tt or robe, which shrink further"),
        ("tt", (5, 5000), 900, 200, "lower method_threshold, or take robe, which shrinks further"),
        ("tt", (5000,), 10_000, 0, "take robe, which shrinks further"),
        ("robe", (150, 5000), 100, 200, "lower method_threshold"),
        ("robe", (5000,), 100_000, 0, "ask for a lower compress_rate"),
        ("qr", (190, 250), 100, 200, "lower method_threshold"),
    ],
)
def test_advice_on_a_shortfall_fits_method_and_threshold(
    method: str, rows: tuple[int, ...], rate: float, threshold: int, advice: str
) -> None:
    shortfall = compress(tables_of(rows), method, rate, threshold).shortfall
    assert shortfall is not None
    assert shortfall.endswith(f"({advice})")
    assert ("of at most" in shortfall) == (threshold > 0)


@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=5),
    st.lists(st.integers(1, 17), min_size=1, max_size=3),
    st.sampled_from(COMPRESSING),
    st.floats(1, 300),
    st.sampled_from([0, 1, 50, 200]),
)
@settings(derandomize=True, deadline=None, max_examples=120)
def test_small_tables(rows: list[int], dims: list[int], method: str, rate: float, threshold: int) -> None:
    tables = tables_of(tuple(rows), tuple(dims))
    result = compress(tables, method, rate, threshold)
    check(tables, result, method, rate, threshold)
    # Whatever is chosen can be built.
    for _, after in zip(tables, result.tables, strict=True):
        if method != "robe":
            assert (
                backend_of(after).num_params([after]) * 4
                == result.memory[result.tables.index(after)].num_bytes
            )


@given(st.integers(201, 400), st.integers(1, 9), st.integers(1, 9), st.floats(1, 1.2))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_a_robe_array_of_uneven_blocks_is_never_larger_than_dense(
    rows: int, one: int, two: int, rate: float
) -> None:
    tables = tables_of((rows, rows + 1), (one, two))
    check(tables, compress(tables, "robe", rate), "robe", rate, 200)


@pytest.mark.parametrize("method", COMPRESSING)
def test_the_same_question_has_the_same_answer(method: str) -> None:
    tables = tables_of((9000, 120, 4321, 777, 50_000), (16, 8))
    assert compress(tables, method, 7.5) == compress(tables, method, 7.5)
    # Names carry no meaning, and compressions already set are replaced.
    other = [
        TableSpec(
            name=t.name,
            num_embeddings=t.num_embeddings,
            embedding_dim=t.embedding_dim,
            compression=TensorTrain(rank=3),
        )
        for t in tables
    ]
    assert compress(other, method, 7.5) == compress(tables, method, 7.5)


@pytest.mark.parametrize("method", COMPRESSING)
def test_other_fields_are_kept(method: str) -> None:
    table = TableSpec(
        name="t", num_embeddings=5000, embedding_dim=8, feature_names=("a", "b"), pooling="mean", init_std=0.2
    )
    (after,) = compress([table], method, 3).tables
    assert (after.feature_names, after.pooling, after.init_std) == (("a", "b"), "mean", 0.2)
    assert after.compression.method == method


@pytest.mark.parametrize("method", ["tt", "qr", "md"])
def test_larger_budgets_store_more(method: str) -> None:
    tables = tables_of((9000, 120, 4321, 777, 50_000))
    sizes = [compress(tables, method, rate).memory.total.num_bytes for rate in (1, 2, 4, 8, 16, 32)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == compress(tables, "dense", 1).memory.total.num_bytes


def test_dense() -> None:
    tables = tables_of((50, 5000))
    result = compress(tables, "dense", 1)
    assert result.tables == tuple(tables)
    assert result.shortfall is None
    with pytest.raises(ConfigError, match=r"'dense' cannot reach compress_rate=10; use tt, qr, robe or md"):
        compress(tables, "dense", 10)


def test_only_small_tables_leave_nothing_to_compress() -> None:
    tables = tables_of((50, 100, 200))
    for method in COMPRESSING:
        result = compress(tables, method, 10)
        assert result.tables == tuple(tables)
        assert result.shortfall is not None
        assert "3 tables of at most 200 rows" in result.shortfall
        assert "lower method_threshold" in result.shortfall


@pytest.mark.parametrize("rate", [0, 0.99, -1, math.nan, math.inf])
def test_f15_rates_below_one(rate: float) -> None:
    with pytest.raises(ConfigError, match=r"compress_rate=.*>= 1, e\.g\. 100"):
        compress(tables_of((500,)), "tt", rate)


def test_f15_unknown_method() -> None:
    with pytest.raises(ConfigError, match=r"'hash' is unknown; use one of dense, tt, qr, robe, md"):
        compress(tables_of((500,)), "hash", 10)
