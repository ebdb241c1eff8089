"""Counting, ids and look-ups against dictionaries, with memory bounds small enough to spill at every turn."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.data.statistics import CountHistogram
from recemb.data.token_counts import TokenCounter
from recemb.data.token_map import TokenMap, open_maps
from recemb.data.vocabulary import FeatureVocabulary, id_dtype, read_vocabulary, write_vocabulary

TOKENS = st.one_of(
    st.integers(0, 30), st.integers(0, 2**32 - 1), st.sampled_from([0, 2**24 + 1, 2**31, 2**32 - 1])
)


def count(work: Path, tokens: list[int], max_entries: int, pieces: int) -> TokenCounter:
    counter = TokenCounter(work / "cat_0", max_entries)
    for piece in np.array_split(np.array(tokens, np.uint32), pieces):
        counter.add(piece)
    return counter


def expected_ids(
    tokens: list[int], missing: int, min_count: int, max_ind_range: int | None
) -> dict[int | None, int]:
    """The documented rule: falling count, ties by token, the empty field above all tokens; 0 is left out."""
    counts: Counter[int] = Counter(tokens)
    if missing:
        counts[2**32] = missing
    order = sorted(counts, key=lambda token: (-counts[token], token))
    kept = [token for token in order if counts[token] >= min_count][
        : max_ind_range - 1 if max_ind_range else None
    ]
    return {None if token == 2**32 else token: index for index, token in enumerate(kept, start=1)}


@settings(derandomize=True, deadline=None, max_examples=120)
@given(
    tokens=st.lists(TOKENS, max_size=120),
    missing=st.integers(0, 6),
    min_count=st.integers(1, 3),
    max_ind_range=st.sampled_from([None, 2, 5, 40]),
    max_entries=st.sampled_from([1, 3, 16, 10_000]),
)
def test_ids_follow_falling_frequency_whatever_the_memory(
    tmp_path_factory: pytest.TempPathFactory,
    tokens: list[int],
    missing: int,
    min_count: int,
    max_ind_range: int | None,
    max_entries: int,
) -> None:
    work = tmp_path_factory.mktemp("v")
    counted = count(work, tokens, max_entries, 3).finish()
    paths = (work / "cat_0.parquet", work / "map")
    vocabulary = write_vocabulary("cat_0", counted, missing, (min_count, max_ind_range), paths, max_entries)
    expected = expected_ids(tokens, missing, min_count, max_ind_range)
    assert vocabulary.num_embeddings == len(expected) + 1
    assert vocabulary.missing_id == expected.get(None, 0)
    assert vocabulary.summary["distinct"] == len(set(tokens)) + (missing > 0)

    counts: Counter[int | None] = Counter(tokens)
    counts[None] = missing
    found = list(read_vocabulary(paths[0]))
    assert found == [(index, token, counts[token]) for token, index in expected.items()]

    queries = np.array([*tokens, 5, 2**32 - 1, 12345], np.uint32)
    absent = np.zeros(queries.size, np.bool_)
    absent[-1] = True
    answers = [expected.get(int(token), 0) for token in queries[:-1]] + [expected.get(None, 0)]
    for page_entries in (None, 1, 7):
        ids = TokenMap(vocabulary, paths[1], page_entries).lookup(queries, absent)
        assert ids.dtype == np.int64
        assert ids.tolist() == answers


def test_counting_spills_merges_and_cleans_up(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = (rng.random(50_000) ** 4 * 20_000).astype(np.uint32) * np.uint32(200_003)
    counter = count(tmp_path, tokens.tolist(), 500, 7)
    assert len(list(tmp_path.glob("*.run*.tokens"))) > 10
    merged, histogram = counter.finish()
    assert not list(tmp_path.glob("*.run*"))
    expected = Counter(tokens.tolist())
    blocks = list(merged.blocks(333))
    assert max(block[0].size for block in blocks) <= 333
    found = {int(t): int(c) for ts, cs in blocks for t, c in zip(ts, cs, strict=True)}
    assert found == expected
    assert list(found) == sorted(expected)
    assert histogram == Counter(expected.values())
    merged.delete()
    assert not list(tmp_path.iterdir())


def test_spill_files_of_a_killed_run_are_not_counted_again(tmp_path: Path) -> None:
    count(tmp_path, list(range(100)) * 2, 8, 5)  # killed before finish: its runs stay
    assert list(tmp_path.glob("*.run*"))
    merged, _ = count(tmp_path, list(range(50)), 8, 5).finish()
    tokens, counts = merged.read(0, 1000)
    assert tokens.tolist() == list(range(50))
    assert set(counts.tolist()) == {1}


def test_large_map_uses_sorted_queries_and_pages(tmp_path: Path) -> None:
    tokens = np.arange(0, 200_000, dtype=np.uint32) * np.uint32(21_474)
    counter = TokenCounter(tmp_path / "c", 10**6)
    counter.add(tokens.copy())
    vocabulary = write_vocabulary(
        "c", counter.finish(), 0, (1, None), (tmp_path / "c.parquet", tmp_path / "m"), 4096
    )
    rng = np.random.default_rng(1)
    picked = rng.integers(0, tokens.size, 5000)
    queries = np.concatenate([tokens[picked], tokens[picked] + np.uint32(1)])
    expected = np.concatenate([picked + 1, np.zeros(5000, np.int64)])
    nothing_missing = np.zeros(queries.size, np.bool_)
    for page_entries in (None, 50_000, 4097):
        assert (
            TokenMap(vocabulary, tmp_path / "m", page_entries).lookup(queries, nothing_missing) == expected
        ).all()
    small = open_maps([vocabulary], [tmp_path / "m"], 1 << 20)[0]
    assert small._maps, "1.6 MB of map do not fit 1 MB: it must be paged"
    assert not open_maps([vocabulary], [tmp_path / "m"], 1 << 30)[0]._maps
    assert (small.lookup(queries, nothing_missing) == expected).all()


def test_f5_id_width_follows_cardinality() -> None:
    assert [id_dtype(rows).itemsize for rows in (1, 2**31, 2**31 + 1, 2**33)] == [4, 4, 8, 8]


def test_vocabulary_file_has_one_schema_and_its_empty_field(tmp_path: Path) -> None:
    counter = count(tmp_path, [7, 7, 7, 9, 9], 100, 1)
    write_vocabulary("cat_0", counter.finish(), 3, (1, None), (tmp_path / "c.parquet", tmp_path / "m"), 100)
    table = pq.read_table(tmp_path / "c.parquet")
    assert table.to_pydict() == {"token": [7, None, 9], "count": [3, 3, 2]}


def test_missing_id_counts_its_ties() -> None:
    assert expected_ids([7, 7, 7, 9, 9], 3, 1, None) == {7: 1, None: 2, 9: 3}


def test_a_feature_that_is_always_empty(tmp_path: Path) -> None:
    vocabulary = write_vocabulary(
        "c",
        TokenCounter(tmp_path / "c", 10).finish(),
        5,
        (2, None),
        (tmp_path / "c.parquet", tmp_path / "m"),
        10,
    )
    assert (vocabulary.num_embeddings, vocabulary.missing_id, vocabulary.map_entries) == (2, 1, 0)
    ids = TokenMap(vocabulary, tmp_path / "m", None).lookup(
        np.array([0, 4], np.uint32), np.array([True, False])
    )
    assert ids.tolist() == [1, 0]
    assert isinstance(vocabulary, FeatureVocabulary)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=60))
def test_histogram_shares_equal_a_sorted_list(counts: list[int]) -> None:
    histogram = CountHistogram.of(np.array(counts, np.int64))
    falling = sorted(counts, reverse=True)
    total = max(sum(counts), 1)
    assert (histogram.num_rows, histogram.lookups) == (len(counts), sum(counts))
    for size, share in histogram.top_share().items():
        assert share == pytest.approx(sum(falling[: int(size)]) / total)
    assert set(histogram.top_share()) == {str(n) for n in (1, 10, 100) if n < len(counts)} | {
        str(len(counts))
    }
    assert histogram.top_percent_share(10) == pytest.approx(sum(falling[: max(1, len(counts) // 10)]) / total)
    for bucket in histogram.log2_buckets():
        low = bucket["min_count"]
        inside = [c for c in counts if (c == 0 if low == 0 else low <= c < 2 * low)]
        assert (bucket["rows"], bucket["lookups"]) == (len(inside), sum(inside))
    assert sum(bucket["rows"] for bucket in histogram.log2_buckets()) == len(counts)
    more = histogram.with_row(counts[0])
    assert (more.num_rows, more.lookups) == (len(counts) + 1, sum(counts) + counts[0])
