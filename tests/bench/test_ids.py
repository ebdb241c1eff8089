"""Ids: their range, their order of frequency, and the permutation that needs no table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bench.ids import draw, lay_tree, make_batches, number_of_batches, permute
from bench.settings import BASE, IDS, SCALE_RANK, TREE_OF_1G, G, M
from recemb.backends.tt_shapes import tt_shapes
from recemb.spec import TensorTrain


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 64, 1000, 4097])
def test_permute_is_a_bijection(rows: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(rows), rows)), np.arange(rows))


def test_permute_scatters_neighbours_over_a_billion_rows() -> None:
    rows = 10**9
    places = permute(np.arange(10_000), rows)
    assert len(np.unique(places)) == 10_000
    assert places.min() >= 0
    assert places.max() < rows
    # 10,000 places at random: 1,000 a tenth, a deviation of 30.
    tenths = np.bincount(places // (rows // 10), minlength=10)
    assert np.abs(tenths - 1000).max() < 200
    assert np.abs(np.diff(places)).min() > 1


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("rows", [1, 5, 1000, 10**9])
def test_ids_lie_in_the_table(kind: str, rows: int) -> None:
    ids = draw(kind, rows, 5000, np.random.default_rng(0))
    assert ids.dtype == np.int64
    assert ids.min() >= 0
    assert ids.max() < rows


def test_zipf_is_in_frequency_order_with_exponent_1_05() -> None:
    ids = draw("zipf", 1000, 200_000, np.random.default_rng(0))
    counts = np.bincount(ids, minlength=1000)
    probabilities = np.arange(1, 1001) ** -1.05
    expected = 200_000 * probabilities / probabilities.sum()
    assert np.abs(counts[:20] / expected[:20] - 1).max() < 0.1
    assert counts[:10].tolist() == sorted(counts[:10].tolist(), reverse=True)


def test_permuted_ids_are_the_zipf_ids_elsewhere() -> None:
    zipf, permuted = (draw(kind, 1000, 5000, np.random.default_rng(3)) for kind in ("zipf", "permuted"))
    assert np.array_equal(permuted, permute(zipf, 1000))
    assert not np.array_equal(permuted, zipf)


def test_a_tree_laid_on_a_smaller_table_keeps_its_prefixes_and_rows() -> None:
    wide, narrow = (tt_shapes(n, BASE.dim, TensorTrain(rank=SCALE_RANK))[0][-1] for n in (G, M))
    zipf, laid = (draw(kind, n, 4096, np.random.default_rng(5)) for kind, n in (("zipf", G), (TREE_OF_1G, M)))
    assert laid.min() >= 0
    assert laid.max() < M
    prefixes = [np.unique(ids // last) for ids, last in ((zipf, wide), (laid, narrow))]
    assert len(prefixes[0]) == len(prefixes[1]) > 1000
    counts = [np.unique(ids, return_counts=True)[1] for ids in (zipf, laid)]
    assert np.array_equal(*map(np.sort, counts))


def test_a_batch_laid_is_the_batch_that_the_billion_gets() -> None:
    zipf, laid = (
        make_batches(replace(BASE, rows=(n,), ids=ids)) for n, ids in ((G, "zipf"), (M, TREE_OF_1G))
    )
    wide, narrow = (tt_shapes(n, BASE.dim, TensorTrain(rank=SCALE_RANK))[0][-1] for n in (G, M))
    for k in (0, 1, 63):
        assert len((zipf[k].ids // wide).unique()) == len((laid[k].ids // narrow).unique())
        assert len(zipf[k].ids.unique()) == len(laid[k].ids.unique())


def test_rows_that_a_prefix_has_no_room_for_go_to_others() -> None:
    # 7 prefixes, of 30 rows and the last of 4, onto digits of 27 values.
    ids = np.random.default_rng(0).permutation(np.tile(np.arange(184), 3))
    laid = lay_tree(ids, 30, 10_000, 27)
    assert len(np.unique(laid)) == len(np.unique(np.stack([ids, laid]), axis=1).T) == 184
    assert sorted(np.unique(np.unique(laid) // 27, return_counts=True)[1]) == [22, *[27] * 6]
    with pytest.raises(ValueError, match="184 rows do not fit 7 prefixes of 26"):
        lay_tree(ids, 30, 10_000, 26)


def test_rows_of_a_laid_tree_stay_distinct_while_there_is_room() -> None:
    # 7 prefixes of up to 30 rows, onto digits of 50 values.
    ids = np.random.default_rng(0).integers(7 * 30, size=500)
    laid = lay_tree(ids, 30, 10_000, 50)
    assert len(np.unique(laid)) == len(np.unique(ids))
    assert len(np.unique(np.stack([ids, laid]), axis=1).T) == len(np.unique(ids))
    with pytest.raises(ValueError, match="7 prefixes do not fit a table of 6"):
        lay_tree(ids, 30, 300, 50)


def test_batches_are_distinct_and_repeatable() -> None:
    setting = replace(BASE, rows=(100, 50), batch=8, hots=3)
    batches, again = make_batches(setting), make_batches(setting)
    assert len(batches) == number_of_batches(8) >= 64
    assert len({tuple(batch.ids.tolist()) for batch in batches}) == len(batches)
    assert all(a.ids.equal(b.ids) and a.grad.equal(b.grad) for a, b in zip(batches, again, strict=True))
    first = batches[0]
    assert first.ids.numel() == 2 * 8 * 3
    assert int(first.ids[24:].max()) < 50
    assert first.offsets.tolist() == list(range(0, 49, 3))
    assert first.lengths.tolist() == [3] * 16
    assert first.grad.shape == (8, 2 * setting.dim)
