"""ClickLog: every row once, in order, for all ranks; ids bit-exact; damage is found and named (F5-F7)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.data import click_log as module
from recemb.data import parts
from recemb.data.click_log import ClickLog
from recemb.data.layout import SPLITS
from recemb.errors import ConfigError, DataError

SIZES = [7] * 26


def write_log(
    root: Path,
    rows: dict[str, int],
    *,
    num_embeddings: list[int] | None = None,
    group: int = 40,
    part: int = 160,
) -> dict[str, parts.Rows]:
    """A log with random rows in small row groups and parts; cat_0 holds the row's number modulo its size."""
    sizes = num_embeddings or [100_000, *SIZES[1:]]
    schema = parts.click_log_schema(sizes)
    rng = np.random.default_rng(0)
    content: dict[str, parts.Rows] = {}
    files: dict[str, list[dict[str, Any]]] = {}
    for split in SPLITS:
        n = rows.get(split, 0)
        ids = np.stack([rng.integers(0, size, n, dtype=np.int64) for size in sizes])
        if num_embeddings is None:
            ids[0] = np.arange(n)
        made = parts.Rows(
            rng.integers(0, 2, n).astype(np.uint8), rng.standard_normal((13, n)).astype(np.float32), ids
        )
        content[split] = made
        files[split] = []
        for index, start in enumerate(range(0, n, part)):
            tables = []
            for first in range(start, min(start + part, n), group):
                cut = slice(first, min(first + group, start + part, n))
                piece = parts.Rows(made.labels[cut], made.dense[:, cut], made.ids[:, cut])
                tables.append(parts.rows_to_table(piece, schema))
            name = f"{split}/part-{index:05d}.parquet"
            files[split].append(parts.write_part(root, name, schema, tables).to_json())
    stats = {
        "format_version": 1,
        "rows": {split: rows.get(split, 0) for split in SPLITS},
        "features": [{"name": f"cat_{i}", "num_embeddings": size} for i, size in enumerate(sizes)],
        "files": files,
    }
    (root / "stats.json").write_text(json.dumps(stats))
    return content


def flat(rows: parts.Rows) -> np.ndarray[Any, Any]:
    bits = rows.dense.T.copy().view(np.int32).astype(np.int64)
    return np.column_stack([rows.labels.astype(np.int64), bits, rows.ids.T])


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, parts.Rows]]:
    root = tmp_path_factory.mktemp("log")
    return root, write_log(root, {"train": 1003, "val": 90})


def test_names_and_sizes(log_dir: tuple[Path, dict[str, parts.Rows]]) -> None:
    log = ClickLog.open(log_dir[0])
    assert log.feature_names == [f"cat_{i}" for i in range(26)]
    assert log.dense_names == [f"int_{i}" for i in range(13)]
    assert log.num_embeddings_per_feature == [100_000, *SIZES[1:]]
    assert [log.num_rows(split) for split in SPLITS] == [1003, 90, 0]
    assert log.stats["rows"]["train"] == 1003


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    batch_size=st.sampled_from([1, 7, 40, 64, 999, 1003, 5000]),
    world_size=st.integers(1, 5),
    seed=st.sampled_from([None, 0, 3, 2**63]),
    keep=st.booleans(),
)
def test_every_row_exactly_once_over_all_ranks(
    log_dir: tuple[Path, dict[str, parts.Rows]],
    criteo: SimpleNamespace,
    batch_size: int,
    world_size: int,
    seed: int | None,
    keep: bool,
) -> None:
    root, content = log_dir
    log = ClickLog.open(root)
    log._keep = keep
    per_rank = []
    for rank in range(world_size):
        got = list(log.batches("train", batch_size, shuffle_seed=seed, rank=rank, world_size=world_size))
        assert len(got) == log.num_batches("train", batch_size, rank, world_size)
        per_rank.append(got)
    # batch i is on rank i mod world_size: put them back in order and compare with one process
    merged = [
        per_rank[index % world_size][index // world_size]
        for index in range(sum(len(batches) for batches in per_rank))
    ]
    assert all(batch.labels.size == batch_size for batch in merged[:-1])
    alone = criteo.epoch(log, "train", 1003, shuffle_seed=seed)
    together = np.concatenate([batch.ids[0] for batch in merged])
    assert (together == alone[:, 14]).all()
    expected = flat(content["train"])
    if seed is None:
        assert (alone == expected).all()
    else:
        assert (alone != expected).any()
        assert (alone[np.argsort(alone[:, 14])] == expected).all()


@pytest.mark.parametrize("seed", [None, 5])
def test_resuming_gives_the_rest_of_the_epoch(
    log_dir: tuple[Path, dict[str, parts.Rows]], criteo: SimpleNamespace, seed: int | None
) -> None:
    log = ClickLog.open(log_dir[0])
    options = {"shuffle_seed": seed, "rank": 1, "world_size": 3}
    whole = list(log.batches("train", 20, **options))
    for start in (0, 1, 9, len(whole), len(whole) + 3):
        rest = list(log.batches("train", 20, start_batch=start, **options))
        assert [batch.ids.tolist() for batch in rest] == [batch.ids.tolist() for batch in whole[start:]]
    # the limit is the length of the epoch, so a resumed run ends where the unbroken one does
    limited = list(log.batches("train", 20, start_batch=4, limit_batches=6, **options))
    assert [batch.ids.tolist() for batch in limited] == [batch.ids.tolist() for batch in whole[4:6]]
    assert list(log.batches("train", 20, limit_batches=0, **options)) == []


def test_resuming_decodes_only_what_is_left(
    log_dir: tuple[Path, dict[str, parts.Rows]], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = ClickLog.open(log_dir[0])
    log._keep = False
    read: list[int] = []
    decode = parts.PartFile.read_row_group

    def counted(self: parts.PartFile, group: int) -> parts.Rows:
        read.append(group)
        return decode(self, group)

    monkeypatch.setattr(parts.PartFile, "read_row_group", counted)
    list(log.batches("train", 40, start_batch=20))
    assert len(read) == 26 - 20


def test_shuffle_depends_on_the_seed_alone_and_mixes_files(
    log_dir: tuple[Path, dict[str, parts.Rows]], criteo: SimpleNamespace
) -> None:
    log = ClickLog.open(log_dir[0])
    first = criteo.epoch(log, "train", 64, shuffle_seed=1)
    again = ClickLog.open(log_dir[0])
    again._keep = False
    assert (criteo.epoch(again, "train", 17, shuffle_seed=1) == first).all()
    assert (criteo.epoch(log, "train", 64, shuffle_seed=2) != first).any()
    # a window holds 16 of 26 row groups: its first batch of 64 rows comes from many of them
    assert len(set((first[:64, 14] // 40).tolist())) > 8


def test_windows_bound_what_is_held(
    log_dir: tuple[Path, dict[str, parts.Rows]], criteo: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHUFFLE_WINDOW_ROW_GROUPS", 3)
    log = ClickLog.open(log_dir[0])
    rows = criteo.epoch(log, "train", 50, shuffle_seed=1)
    groups = rows[:, 14] // 40
    assert sorted(rows[:, 14].tolist()) == list(range(1003))
    sizes = [len(set(groups[start : start + 120].tolist())) for start in range(0, 960, 120)]
    assert max(sizes) <= 6  # at most two windows meet in 120 rows


def test_small_logs_are_decoded_once(
    log_dir: tuple[Path, dict[str, parts.Rows]], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = ClickLog.open(log_dir[0])
    list(log.batches("train", 100))
    monkeypatch.setattr(parts.PartFile, "read_row_group", lambda *args: pytest.fail("decoded twice"))
    first = list(log.batches("train", 100, shuffle_seed=0))
    first[0].ids[:] = -1  # a batch is the caller's own: changing it must not reach the kept rows
    again = next(log.batches("train", 100))
    assert (again.ids[0] == np.arange(100)).all()


@pytest.mark.parametrize("rows", [2**24 + 2, 2**31, 2**31 + 8, 2**32 + 8, 2**40])
def test_f5_large_ids_survive_bit_exactly(tmp_path: Path, criteo: SimpleNamespace, rows: int) -> None:
    edges = [
        0,
        rows - 1,
        rows - 2,
        min(2**24 + 1, rows - 1),
        min(2**31 - 1, rows - 1),
        min(2**32 + 1, rows - 1),
    ]
    content = write_log(tmp_path, {"train": 6}, num_embeddings=[rows, *SIZES[1:]])
    schema = parts.click_log_schema([rows, *SIZES[1:]])
    content["train"].ids[0] = edges
    info = parts.write_part(
        tmp_path, "train/part-00000.parquet", schema, [parts.rows_to_table(content["train"], schema)]
    )
    stats = json.loads((tmp_path / "stats.json").read_text())
    stats["files"]["train"] = [info.to_json()]
    (tmp_path / "stats.json").write_text(json.dumps(stats))
    assert str(schema.field("cat_0").type) == ("int32" if rows <= 2**31 else "int64")
    log = ClickLog.open(tmp_path)
    for seed in (None, 3):
        found = criteo.epoch(log, "train", 4, shuffle_seed=seed)
        assert sorted(found[:, 14].tolist()) == sorted(edges)


def test_an_id_that_its_column_cannot_hold_is_never_wrapped(tmp_path: Path) -> None:
    schema = parts.click_log_schema(SIZES)
    rows = parts.Rows(np.zeros(1, np.uint8), np.zeros((13, 1), np.float32), np.full((26, 1), 2**31 + 3))
    with pytest.raises(pa.ArrowInvalid):
        parts.rows_to_table(rows, schema)


def damaged(source: Path, target: Path, change: Callable[[bytes], bytes]) -> Path:
    shutil.copytree(source, target)
    path = target / "train" / "part-00001.parquet"
    path.write_bytes(change(path.read_bytes()))
    return path


@pytest.mark.parametrize("tenth", range(10))
def test_f6_cut_file_is_named_at_open(
    log_dir: tuple[Path, dict[str, parts.Rows]], tmp_path: Path, tenth: int
) -> None:
    path = damaged(log_dir[0], tmp_path / "log", lambda data: data[: len(data) * tenth // 10])
    with pytest.raises(DataError, match="damaged") as caught:
        ClickLog.open(tmp_path / "log")
    assert str(path) in str(caught.value)


def test_f6_every_flipped_bit_is_found(log_dir: tuple[Path, dict[str, parts.Rows]], tmp_path: Path) -> None:
    size = (log_dir[0] / "train" / "part-00001.parquet").stat().st_size
    rng = np.random.default_rng(0)
    positions = [0, 3, 4, size - 1, size - 5, *rng.integers(0, size, 60).tolist()]
    path = damaged(log_dir[0], tmp_path / "log", lambda data: data)
    whole = path.read_bytes()
    for position in positions:
        changed = bytearray(whole)
        changed[position] ^= 1 << (position % 8)
        path.write_bytes(changed)
        with pytest.raises(DataError) as caught:
            for _ in ClickLog.open(tmp_path / "log").batches("train", 64):
                pass
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda table: table.drop_columns(["cat_3"]), r"missing \['cat_3'\]"),
        (lambda table: table.set_column(20, "cat_6", table.column(20).cast("int64")), "cat_6: int64"),
        (lambda table: table.append_column("extra", table.column(0)), r"unexpected \['extra'\]"),
        (lambda table: table.select([*table.column_names[1:], "label"]), "order of the columns"),
    ],
)
def test_f6_schema_difference_names_file_and_column(
    log_dir: tuple[Path, dict[str, parts.Rows]], tmp_path: Path, change: Callable[[Any], Any], reason: str
) -> None:
    shutil.copytree(log_dir[0], tmp_path / "log")
    path = tmp_path / "log" / "val" / "part-00000.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    stats = json.loads((tmp_path / "log" / "stats.json").read_text())
    stats["files"]["val"] = [parts.fingerprint(path, "val/part-00000.parquet").to_json()]
    (tmp_path / "log" / "stats.json").write_text(json.dumps(stats))
    with pytest.raises(DataError, match=reason) as caught:
        ClickLog.open(tmp_path / "log")
    assert str(path) in str(caught.value)


def test_f6_missing_file_and_wrong_row_count(
    log_dir: tuple[Path, dict[str, parts.Rows]], tmp_path: Path
) -> None:
    shutil.copytree(log_dir[0], tmp_path / "log")
    stats_path = tmp_path / "log" / "stats.json"
    stats = json.loads(stats_path.read_text())
    stats["rows"]["val"] = 91
    stats_path.write_text(json.dumps(stats))
    with pytest.raises(DataError, match="files of val hold 90 rows, its row count is 91"):
        ClickLog.open(tmp_path / "log")
    stats["rows"]["val"] = 90
    stats_path.write_text(json.dumps(stats))
    path = tmp_path / "log" / "val" / "part-00000.parquet"
    path.unlink()
    with pytest.raises(DataError, match=r"val/part-00000\.parquet: No such file"):
        ClickLog.open(tmp_path / "log")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format_version": 2}', '{"format_version": 1}', "[" * 9999]
)
def test_damaged_stats_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "stats.json").write_text(text)
    with pytest.raises(DataError, match=r"stats\.json"):
        ClickLog.open(tmp_path)


def test_directories_that_are_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="recemb prepare"):
        ClickLog.open(tmp_path / "absent")
    (tmp_path / ".prepare").mkdir()
    with pytest.raises(DataError, match="unfinished; give the same `recemb prepare` command again"):
        ClickLog.open(tmp_path)


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("cat_4", 7, r"column cat_4, row 55: 7 is outside \[0, 7\)"),
        ("cat_4", -1, r"column cat_4, row 55: -1 is outside"),
        ("cat_0", 2**31 - 1, r"column cat_0, row 55: 2147483647 is outside \[0, 100000\)"),
        ("label", 2, "column label, row 55: 2 is neither 0 nor 1"),
        ("int_12", np.nan, "column int_12, row 55: nan is not finite"),
        ("int_0", -np.inf, "column int_0, row 55: -inf is not finite"),
    ],
)
def test_bad_values_name_file_column_and_row(tmp_path: Path, column: str, value: float, reason: str) -> None:
    write_log(tmp_path, {"train": 90}, group=40)
    path = tmp_path / "train" / "part-00000.parquet"
    table = pq.read_table(path)
    index = table.column_names.index(column)
    values = table.column(column).to_numpy().copy()
    values[55] = value
    table = table.set_column(index, table.schema.field(index), pa.array(values))
    pq.write_table(table, path, row_group_size=40)
    stats = json.loads((tmp_path / "stats.json").read_text())
    stats["files"]["train"] = [parts.fingerprint(path, "train/part-00000.parquet").to_json()]
    (tmp_path / "stats.json").write_text(json.dumps(stats))
    batches = ClickLog.open(tmp_path).batches("train", 40)
    assert next(batches).labels.size == 40
    with pytest.raises(DataError, match=reason) as caught:
        next(batches)
    assert str(path) in str(caught.value)


def test_f7_a_file_that_shrinks_while_being_read_is_an_error(
    log_dir: tuple[Path, dict[str, parts.Rows]], tmp_path: Path
) -> None:
    """In a child, for with a memory map this would be SIGBUS."""
    shutil.copytree(log_dir[0], tmp_path / "log")
    script = (
        "import os, sys\n"
        "from recemb.data.click_log import ClickLog\n"
        "log = ClickLog.open(sys.argv[1])\n"
        "log._keep = False\n"
        "batches = log.batches('train', 40)\n"
        "next(batches)\n"
        "os.truncate(sys.argv[1] + '/train/part-00000.parquet', 500)\n"
        "try:\n"
        "    list(batches)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "log")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert "DataError" in result.stdout
    assert "part-00000.parquet: damaged (500 bytes" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        {"split": "valid"},
        {"batch_size": 0},
        {"rank": 2, "world_size": 2},
        {"rank": -1},
        {"world_size": 0},
        {"start_batch": -1},
        {"limit_batches": -1},
    ],
)
def test_bad_arguments_are_reported_by_the_call_itself(
    log_dir: tuple[Path, dict[str, parts.Rows]], arguments: dict[str, Any]
) -> None:
    log = ClickLog.open(log_dir[0])
    with pytest.raises(ConfigError, match=str(next(iter(arguments.values())))):
        log.batches(**{"split": "train", "batch_size": 10, **arguments})


def test_an_absent_split_has_no_batches(log_dir: tuple[Path, dict[str, parts.Rows]]) -> None:
    log = ClickLog.open(log_dir[0])
    assert log.num_batches("test", 10) == 0
    assert list(log.batches("test", 10)) == []
    assert list(log.batches("test", 10, shuffle_seed=1)) == []


def test_more_ranks_than_batches(log_dir: tuple[Path, dict[str, parts.Rows]]) -> None:
    log = ClickLog.open(log_dir[0])
    counts = [log.num_batches("val", 64, rank, 4) for rank in range(4)]
    assert counts == [1, 1, 0, 0]
    assert [len(list(log.batches("val", 64, rank=rank, world_size=4))) for rank in range(4)] == counts
