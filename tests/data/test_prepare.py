"""``prepare`` end to end against the oracle: contents, vocabulary, splits (F3, F4)."""

from __future__ import annotations

import gzip
import os
import stat
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from recemb.data import layout
from recemb.data import prepare as module
from recemb.data.click_log import ClickLog
from recemb.data.dense import log_shift
from recemb.data.prepare import prepare
from recemb.data.prepare_settings import PrepareSettings
from recemb.data.vocabulary import read_vocabulary
from tests.data.conftest import settings_for


def expected_rows(
    rows: list[list[int | None]], train: int, min_count: int, max_ind_range: int | None
) -> tuple[np.ndarray[Any, Any], list[int], list[dict[int | None, int]]]:
    """Label, bits of the dense values and ids [n, 40] by the rules; rows per table; id of each token."""
    columns: list[np.ndarray[Any, Any]] = [np.array([row[0] for row in rows], np.int64)]
    for field in range(1, 14):
        values = np.array([row[field] or 0 for row in rows], np.int64)
        missing = np.array([row[field] is None for row in rows])
        columns.append(log_shift(values, missing).view(np.int32).astype(np.int64))
    sizes, maps = [], []
    for field in range(14, 40):
        counts = Counter(row[field] for row in rows[:train])
        order = sorted(counts, key=lambda token: (-counts[token], 2**32 if token is None else token))
        kept = [token for token in order if counts[token] >= min_count]
        if max_ind_range:
            kept = kept[: max_ind_range - 1]
        ids = {token: index for index, token in enumerate(kept, start=1)}
        sizes.append(len(kept) + 1)
        maps.append(ids)
        columns.append(np.array([ids.get(row[field], 0) for row in rows], np.int64))
    return np.column_stack(columns), sizes, maps


@pytest.mark.parametrize(
    ("min_count", "max_ind_range", "memory_budget"), [(1, None, 1 << 30), (2, None, 1 << 20), (3, 6, 1 << 20)]
)
def test_rows_vocabulary_and_statistics_follow_the_rules(
    criteo: SimpleNamespace,
    tmp_path: Path,
    small_parts: None,
    monkeypatch: pytest.MonkeyPatch,
    min_count: int,
    max_ind_range: int | None,
    memory_budget: int,
) -> None:
    if memory_budget == 1 << 20:
        monkeypatch.setattr(module, "_BYTES_PER_ENTRY", memory_budget // 20)  # 20 tokens in memory
    texts = [
        criteo.make_tsv(333, seed=1),
        criteo.make_tsv(250, seed=2).removesuffix(b"\n"),
        criteo.make_tsv(7, seed=3),
    ]
    settings = settings_for(
        tmp_path,
        *texts,
        min_count=min_count,
        max_ind_range=max_ind_range,
        val_fraction=Fraction(1, 7),
        test_fraction=Fraction(1, 14),
        memory_budget=memory_budget,
    )
    result = prepare(settings)
    assert not result.already_done
    rows = [row for text in texts for row in criteo.oracle_file(text)[0]]
    n, val, test = len(rows), len(rows) // 7, len(rows) // 14
    train = n - val - test
    expected, sizes, maps = expected_rows(rows, train, min_count, max_ind_range)
    log = ClickLog.open(settings.output)
    assert log.num_embeddings_per_feature == sizes
    assert log.stats == result.stats
    assert log.stats["rows"] == {"train": train, "val": val, "test": test}
    bounds = {"train": (0, train), "val": (train, train + val), "test": (train + val, n)}
    for split, (first, last) in bounds.items():
        assert (criteo.epoch(log, split, 64) == expected[first:last]).all()
        assert log.stats["clicks"][split] == expected[first:last, 0].sum()
    for index, feature in enumerate(log.stats["features"]):
        tokens = [row[14 + index] for row in rows[:train]]
        counts = Counter(tokens)
        assert feature["name"] == f"cat_{index}"
        assert feature["distinct"] == len(counts)
        assert feature["missing"] == counts[None]
        found = list(read_vocabulary(settings.output / "vocabulary" / f"cat_{index}.parquet"))
        assert found == [(position, token, counts[token]) for token, position in maps[index].items()]
        for split, (first, last) in bounds.items():
            share = float((expected[first:last, 14 + index] == 0).mean())
            assert feature["oov_share"][split] == pytest.approx(share)
        lookups = sorted(Counter(expected[:train, 14 + index].tolist()).values(), reverse=True)
        assert feature["top_share"]["1"] == pytest.approx(lookups[0] / train)
        assert sum(bucket["rows"] for bucket in feature["count_histogram"]) == len(counts)
    assert [entry["missing"] for entry in log.stats["dense"]] == [
        sum(row[1 + index] is None for row in rows) for index in range(13)
    ]
    assert [source["rows"] for source in log.stats["sources"]] == [333, 250, 7]
    assert not (settings.output / ".prepare").exists()
    assert not list(settings.output.rglob("*.tmp"))


def test_f4_no_row_is_in_two_splits(criteo: SimpleNamespace, tmp_path: Path, small_parts: None) -> None:
    text = criteo.make_tsv(600, vocabulary=10**6)
    assert len(set(text.splitlines())) == 600
    settings = settings_for(
        tmp_path, text, min_count=1, val_fraction=Fraction(1, 5), test_fraction=Fraction(1, 5)
    )
    prepare(settings)
    log = ClickLog.open(settings.output)
    hashes = {
        split: {hash(row.tobytes()) for row in criteo.epoch(log, split, 100)}
        for split in ("train", "val", "test")
    }
    assert not hashes["train"] & hashes["val"]
    assert not hashes["train"] & hashes["test"]
    # the rows held out hold tokens that training never saw: they are row 0, not extra rows of the table
    unseen = criteo.epoch(log, "val", 1000)[:, 14:]
    assert (unseen == 0).any()
    assert unseen.max() < max(log.num_embeddings_per_feature)


@pytest.mark.parametrize("name", ["test_train.txt", "train/day_0_test", "val.gz"])
def test_f3_the_name_of_a_file_says_nothing(
    criteo: SimpleNamespace, tmp_path: Path, small_parts: None, name: str
) -> None:
    path = tmp_path / "in" / name
    path.parent.mkdir(parents=True)
    text = criteo.make_tsv(40)
    path.write_bytes(text)
    result = prepare(PrepareSettings(inputs=(path,), output=tmp_path / "test_out"))
    assert result.stats["rows"] == {"train": 36, "val": 4, "test": 0}
    assert [f["name"] for f in result.stats["files"]["val"]] == ["val/part-00000.parquet"]


def test_gzip_and_plain_give_the_same_files(
    criteo: SimpleNamespace, tmp_path: Path, small_parts: None
) -> None:
    text = criteo.make_tsv(300)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = settings_for(tmp_path / "a", text)
    packed = settings_for(tmp_path / "b", gzip.compress(text))
    prepare(plain)
    prepare(packed)
    for split in ("train", "val", "vocabulary"):
        assert criteo.tree(plain.output / split) == criteo.tree(packed.output / split)


def test_a_file_is_durable_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    sync, replace = os.fsync, os.replace

    def recording_sync(descriptor: int) -> None:
        calls.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def recording_replace(source: Any, target: Any) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recording_sync)
    monkeypatch.setattr(os, "replace", recording_replace)
    layout.write_json(tmp_path / "a.json", {"x": 1})
    assert calls == ["file", "replace", "directory"]
    assert layout.read_json(tmp_path / "a.json") == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("name", "rows", "clicks", "largest"),
    [
        ("criteo_kaggle/train_sample.tsv.gz", (105_602, 11_733), (27_097, 2_961), 6523),
        ("criteo_1tb/day_0_sample.gz", (9000, 1000), (237, 28), 1133),
    ],
)
def test_real_samples(
    shared_data: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    rows: tuple[int, int],
    clicks: tuple[int, int],
    largest: int,
) -> None:
    stats = prepare(PrepareSettings(inputs=(shared_data(name),), output=tmp_path / "out")).stats
    assert (stats["rows"]["train"], stats["rows"]["val"]) == rows
    assert (stats["clicks"]["train"], stats["clicks"]["val"]) == clicks
    log = ClickLog.open(tmp_path / "out")
    assert max(log.num_embeddings_per_feature) == largest
    total = sum(float(batch.labels.sum()) for batch in log.batches("train", 4096, shuffle_seed=0))
    assert total == clicks[0]
    counts = pq.read_table(tmp_path / "out" / "vocabulary" / "cat_2.parquet").column("count").to_numpy()
    assert (np.diff(counts) <= 0).all()
    assert counts[-1] >= 2
