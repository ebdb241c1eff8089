"""Automatic tensor-train shapes against brute force."""

from __future__ import annotations

import math
import re
import time
from dataclasses import replace
from itertools import accumulate, pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.backends import tt_shapes as module
from recemb.backends.tensor_train import TensorTrainBackend
from recemb.backends.tt_shapes import best_row_shape, tt_shapes
from recemb.errors import ConfigError
from recemb.id_maps.radix import factorizations
from recemb.spec import TableSpec, TensorTrain
from tests.backends.cases import table


def least_cost(rows: int, costs: tuple[int, ...]) -> int:
    """By trying every p with entries up to ``rows``; the last entry is then the smallest that fits."""
    best = costs[-1] * rows + sum(costs[:-1])
    for head in product(range(1, rows + 1), repeat=len(costs) - 1):
        last = -(-rows // math.prod(head))
        best = min(best, sum(c * p for c, p in zip(costs, (*head, last), strict=True)))
    return best


@given(st.integers(1, 400), st.lists(st.integers(1, 60), min_size=2, max_size=2))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_two_cores_against_brute_force(rows: int, costs: list[int]) -> None:
    shape = best_row_shape(rows, tuple(costs))
    assert math.prod(shape) >= rows
    assert sum(c * p for c, p in zip(costs, shape, strict=True)) == least_cost(rows, tuple(costs))


@given(st.integers(1, 60), st.lists(st.integers(1, 200), min_size=3, max_size=3))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_three_cores_against_brute_force(rows: int, costs: list[int]) -> None:
    shape = best_row_shape(rows, tuple(costs))
    assert all(p >= 1 for p in shape)
    assert math.prod(shape) >= rows
    assert sum(c * p for c, p in zip(costs, shape, strict=True)) == least_cost(rows, tuple(costs))


@given(st.integers(1, 18), st.lists(st.integers(1, 300), min_size=4, max_size=4))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_four_cores_against_brute_force(rows: int, costs: list[int]) -> None:
    shape = best_row_shape(rows, tuple(costs))
    assert math.prod(shape) >= rows
    assert sum(c * p for c, p in zip(costs, shape, strict=True)) == least_cost(rows, tuple(costs))


@pytest.mark.parametrize("rows", [10_131_227, 8_351_593, 2**31 + 1, 2**33, 2**33 - 9])
@pytest.mark.parametrize("rank", [2, 32])
def test_large_tables_come_close_to_the_continuous_optimum(rows: int, rank: int) -> None:
    costs = (2 * rank, 2 * rank * rank, 4 * rank)
    shape = best_row_shape(rows, costs)
    assert math.prod(shape) >= rows
    cost = sum(c * p for c, p in zip(costs, shape, strict=True))
    bound = 3 * (rows * math.prod(costs)) ** (1 / 3)
    assert bound * (1 - 1e-9) <= cost <= bound * 1.02


@given(
    st.integers(1, 2000),
    st.sampled_from([1, 2, 4, 7, 12, 16, 30]),
    st.integers(2, 4),
    st.lists(st.integers(1, 12), min_size=3, max_size=3),
)
@settings(derandomize=True, deadline=None, max_examples=80)
def test_shapes_fit_the_table(rows: int, dim: int, order: int, ranks: list[int]) -> None:
    compression = TensorTrain(rank=tuple(ranks[: order - 1]), num_cores=order)
    row_shape, dim_shape = tt_shapes(rows, dim, compression)
    assert len(row_shape) == len(dim_shape) == order
    assert math.prod(row_shape) >= rows
    assert math.prod(dim_shape) == dim


@given(st.sampled_from([1, 2, 4, 7, 12, 16, 30]), st.lists(st.integers(1, 34), min_size=1, max_size=3))
@settings(derandomize=True, deadline=None, max_examples=200)
def test_a_split_of_columns_costs_little_and_loses_no_direction(dim: int, ranks: list[int]) -> None:
    order = len(ranks) + 1
    _, dim_shape = tt_shapes(5000, dim, TensorTrain(rank=tuple(ranks), num_cores=order))
    splits = [s for s in product(range(1, dim + 1), repeat=order) if math.prod(s) == dim]

    def spans(split: tuple[int, ...]) -> bool:
        """Rows that share all digits on one side of a bond span D directions, for each bond and side."""
        left = list(accumulate(split, int.__mul__))[:-1]
        bonds = list(zip(ranks, left, strict=True))
        return all(rank * q >= dim and rank * (dim // q) >= dim for rank, q in bonds)

    ends = [s for s in splits if spans(s) and math.prod(s[1:-1]) == 1]
    if order > 2 and ends:
        assert dim_shape == min(ends)
        # Of all that lose no direction, nothing is cheaper before the rows.
        before = [math.prod(s[:-1]) for s in splits if spans(s)]
        assert math.prod(dim_shape[:-1]) == min(before)
    else:
        assert sum(dim_shape) == min(map(sum, splits))


@pytest.mark.parametrize("num_cores", [3, 4])
@pytest.mark.parametrize(("dim", "rank"), list(product((8, 16, 64, 128), (4, 8, 16, 32, 64))))
def test_the_split_of_columns_hardly_changes_the_parameters(num_cores: int, dim: int, rank: int) -> None:
    """Up to rounding of p; where a middle core has one slice, fewer columns in it are fewer weights."""
    for rows in (100, 1000, 10_000, 10_000_000):
        free = TensorTrain(rank=rank, num_cores=num_cores)
        ours = TensorTrainBackend.num_params([table(rows, dim, free)])
        even = min(
            TensorTrainBackend.num_params([table(rows, dim, replace(free, dim_shape=split))])
            for split in evenest(dim, num_cores)
        )
        assert ours <= (1.05 if rows <= 1000 else 1.025) * even


def evenest(dim: int, order: int) -> list[tuple[int, ...]]:
    splits = factorizations(dim, order)
    return [split for split in splits if sum(split) == min(map(sum, splits))]


@given(st.integers(1, 5000), st.integers(1, 8), st.integers(1, 30), st.integers(1, 30))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_automatic_rows_never_cost_more_than_given_ones(
    rows: int, rank: int, first: int, second: int
) -> None:
    given_shape = (first, second, -(-rows // (first * second)))
    fixed = table(rows, 16, TensorTrain(rank=rank, row_shape=given_shape, dim_shape=(2, 2, 4)))
    chosen = table(rows, 16, TensorTrain(rank=rank, dim_shape=(2, 2, 4)))
    least = TensorTrainBackend.num_params([chosen])
    assert least <= TensorTrainBackend.num_params([fixed])
    if rank < 4:  # whose columns are split evenly; of the others the test above says how much they may differ
        assert TensorTrainBackend.num_params([table(rows, 16, TensorTrain(rank=rank))]) <= least


def test_given_shapes_are_kept() -> None:
    compression = TensorTrain(rank=8, row_shape=(200, 220, 250), dim_shape=(2, 2, 4))
    assert tt_shapes(10_131_227, 16, compression) == ((200, 220, 250), (2, 2, 4))


def test_f15_shapes_that_hold_too_few_rows_are_refused_with_one_that_fits() -> None:
    with pytest.raises(ConfigError, match=r"holds 999 rows.*num_embeddings=1000.*row_shape=\(9, 3, 38\)"):
        table(1000, 8, TensorTrain(rank=2, row_shape=(9, 3, 37)))
    table(1000, 8, TensorTrain(rank=2, row_shape=(9, 3, 38)))


@given(st.integers(1, 40), st.lists(st.integers(1, 10**10), min_size=3, max_size=3))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_widths_beyond_int64_against_brute_force(rows: int, widths: list[int]) -> None:
    costs = (widths[0], widths[0] * widths[1], widths[1] * widths[2])
    shape = best_row_shape(rows, costs)
    assert math.prod(shape) >= rows
    assert sum(c * p for c, p in zip(costs, shape, strict=True)) == least_cost(rows, costs)


def test_of_equally_good_shapes_the_one_of_saved_tables_is_kept() -> None:
    assert tt_shapes(4677, 128, TensorTrain(rank=(5, 47, 3), num_cores=4))[0] == (78, 1, 1, 60)
    assert tt_shapes(669, 16, TensorTrain(rank=(1, 1, 54), num_cores=4))[0] == (28, 24, 1, 1)


@pytest.mark.parametrize("num_cores", [2, 3, 4])
@pytest.mark.parametrize("rows", [1000, 10_131_227, 2**33])
def test_the_highest_rank_takes_no_long_search(rows: int, num_cores: int) -> None:
    highest = math.isqrt(16 * rows) + 16
    compression = TensorTrain(rank=max(256, highest), num_cores=num_cores)
    started = time.process_time()
    row_shape, _ = tt_shapes(rows, 16, compression)
    assert time.process_time() - started < 10
    assert math.prod(row_shape) >= rows


@pytest.mark.parametrize(
    ("rows", "rank", "useful"),
    [
        (1000, 10**6, 142),
        (1000, 10**8, 142),
        (1000, 2**31, 142),
        (1000, (4, 300), 142),
        (10_131_227, 10**6, 12_747),
    ],
)
def test_f15_ranks_that_add_nothing_are_refused(rows: int, rank: int | tuple[int, ...], useful: int) -> None:
    with pytest.raises(ConfigError, match=rf"table 't'.*rank={re.escape(str(rank))} .*use rank <= {useful},"):
        TableSpec(name="t", num_embeddings=rows, embedding_dim=16, compression=TensorTrain(rank=rank))


def test_a_rank_for_all_tables_may_be_high_for_the_small_ones() -> None:
    assert table(3, 4, TensorTrain(rank=256)).num_embeddings == 3
    assert table(10_131_227, 16, TensorTrain(rank=12_747)).num_embeddings == 10_131_227


@pytest.mark.parametrize(("rank", "num_cores"), [(10**9, 3), (10**9, 4), ((2**30, 2**30, 2**30, 1), 5)])
def test_f15_trains_whose_bytes_torch_cannot_count_are_refused(
    rank: int | tuple[int, ...], num_cores: int
) -> None:
    train = TensorTrain(rank=rank, num_cores=num_cores)
    with pytest.raises(ConfigError, match=r"table 't': .*takes at least .* fewer than 2\*\*61.*e.g. rank=16"):
        TableSpec(name="t", num_embeddings=2**60, embedding_dim=1, compression=train)
    lower = TensorTrain(rank=256, num_cores=num_cores)
    TableSpec(name="t", num_embeddings=2**60, embedding_dim=1, compression=lower)


@pytest.mark.parametrize(("rank", "num_cores"), [(3 * 10**8, 3), (3, 7)])
def test_f15_a_search_that_would_not_end_names_a_shape_near_the_best(
    rank: int, num_cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_SEARCHES", 1000)
    train = TensorTrain(rank=rank, num_cores=num_cores)
    spec = TableSpec(name="t", num_embeddings=2**60, embedding_dim=1, compression=train)
    with pytest.raises(ConfigError, match=r"table 't': .*takes too long to find.*row_shape=") as refused:
        TensorTrainBackend.param_shapes([spec])
    found = re.search(r"row_shape=\(([\d, ]+)\)", str(refused.value))
    assert found is not None
    shape = tuple(map(int, found[1].split(", ")))
    near = table(2**60, 1, TensorTrain(rank=rank, num_cores=num_cores, row_shape=shape))
    costs = [left * right for left, right in pairwise(train.ranks)]
    bound = num_cores * (2**60 * math.prod(costs)) ** (1 / num_cores)
    assert bound * (1 - 1e-9) <= TensorTrainBackend.num_params([near]) <= bound * 1.1


def test_a_search_has_a_hundredfold_of_what_a_large_table_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_SEARCHES", module._MOST_SEARCHES // 100)
    for rows in (10_131_227, 2**33):
        for compression in (TensorTrain(rank=64), TensorTrain(rank=4, num_cores=5), TensorTrain(rank=256)):
            best_row_shape.cache_clear()
            tt_shapes.cache_clear()
            assert math.prod(tt_shapes(rows, 16, compression)[0]) >= rows
