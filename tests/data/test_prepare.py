"""``prepare`` end to end against the oracle: contents, splits, resuming after a kill, bad rows (F1-F4)."""

from __future__ import annotations

import errno
import gzip
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from recemb.data import criteo as reader
from recemb.data import layout, raw_log
from recemb.data import prepare as module
from recemb.data.click_log import ClickLog
from recemb.data.dense import log_shift
from recemb.data.prepare import prepare
from recemb.data.prepare_settings import PrepareSettings
from recemb.data.vocabulary import read_vocabulary
from recemb.errors import ConfigError, DataError


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several raw parts, several output parts and several row groups from a few hundred rows."""
    monkeypatch.setattr(reader, "BLOCK_BYTES", 8000)
    monkeypatch.setattr(raw_log, "PART_ROWS", 100)
    monkeypatch.setattr(module, "PART_ROWS", 160)
    monkeypatch.setattr(module, "ROW_GROUP_ROWS", 50)
    # 170 of them a run are most of a small run's time; that they are made is tested on its own
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def settings_for(tmp_path: Path, *texts: bytes, **options: Any) -> PrepareSettings:
    paths = []
    for index, text in enumerate(texts):
        path = tmp_path / f"input_{index}"
        if not path.exists():
            path.write_bytes(text)
        paths.append(path)
    return PrepareSettings(inputs=tuple(paths), **{"output": tmp_path / "out", **options})


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


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def test_killed_at_any_commit_the_same_call_completes_the_same_directory(
    criteo: SimpleNamespace, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = criteo.make_tsv(240) + b"bad line\n" + criteo.make_tsv(80, seed=5)
    options = {"bad_rows": "skip", "test_fraction": Fraction(1, 10)}
    settings = settings_for(tmp_path, text, criteo.make_tsv(30, seed=6), **options)
    replace, calls = os.replace, 0
    kill_at: int | None = None
    after = False

    def counting(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == kill_at and not after:
            raise Killed
        replace(source, target)
        if calls == kill_at:
            raise Killed

    monkeypatch.setattr(os, "replace", counting)
    prepare(settings)
    expected = criteo.tree(settings.output)
    commits = calls
    assert commits > 70
    assert "rejects.jsonl" in expected
    parsed = 0
    parse_fast = reader._parse_fast

    def parse(block: bytes) -> Any:
        nonlocal parsed
        parsed += 1
        return parse_fast(block)

    monkeypatch.setattr(reader, "_parse_fast", parse)
    points = [*range(1, 14, 2), *range(14, commits - 12, 15), *range(commits - 11, commits, 2)]
    cases = [*((point, point // 2 % 2 == 0) for point in points), (commits, False), (commits, True)]
    for point, late in cases:
        again = PrepareSettings(inputs=settings.inputs, output=tmp_path / f"out{point}{late}", **options)
        calls, kill_at, after = 0, point, late
        with pytest.raises(Killed):
            prepare(again)
        kill_at, parsed = None, 0
        result = prepare(again)
        assert criteo.tree(again.output) == expected, f"killed at commit {point}"
        if point > 20:
            assert parsed == 0, "text that was already parsed is not parsed again"
        assert result.already_done is (point == commits and after)


def test_sigkill_in_a_child_process(criteo: SimpleNamespace, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from recemb.data import criteo, raw_log\n"
        "from recemb.data.prepare import prepare\n"
        "from recemb.data.prepare_settings import PrepareSettings\n"
        "criteo.BLOCK_BYTES, raw_log.PART_ROWS = 8000, 100\n"
        "prepare(PrepareSettings(inputs=(Path(sys.argv[1]),), output=Path(sys.argv[2])))\n"
    )
    text = criteo.make_tsv(5000)
    source, output = tmp_path / "train.txt", tmp_path / "out"
    source.write_bytes(text)
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", script, str(source), str(output)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    child = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 30
    while child.poll() is None and time.monotonic() < deadline:
        if (output / ".prepare" / "raw" / "part-00003.json").exists():
            child.send_signal(signal.SIGKILL)
            break
    assert child.wait(30) in (-signal.SIGKILL, 0)
    with pytest.raises(DataError, match="unfinished") if child.returncode else _nothing():
        ClickLog.open(output)
    subprocess.run(command, env=environment, check=True, timeout=60)
    reference = settings_for(tmp_path, text, output=tmp_path / "reference")
    prepare(reference)
    log, expected = ClickLog.open(output), ClickLog.open(reference.output)
    for split in ("train", "val"):
        assert (criteo.epoch(log, split, 100) == criteo.epoch(expected, split, 100)).all()


class _nothing:  # noqa: N801 - used like contextlib.nullcontext, which pytest.raises' type does not admit
    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


def test_a_finished_directory_is_left_as_it_is(
    criteo: SimpleNamespace, tmp_path: Path, small_parts: None
) -> None:
    settings = settings_for(tmp_path, criteo.make_tsv(100))
    first = prepare(settings)
    before = {path: path.stat().st_mtime_ns for path in settings.output.rglob("*")}
    second = prepare(settings)
    assert second.already_done
    assert second.stats == first.stats
    assert {path: path.stat().st_mtime_ns for path in settings.output.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"min_count": 3}, "--min_count: 2 -> 3"),
        ({"max_ind_range": 10}, "--max_ind_range: None -> 10"),
        ({"val_fraction": Fraction(1, 4)}, "--val_fraction: 1/10 -> 1/4"),
        ({"dataset_name": "criteo_1tb"}, "--dataset_name: criteo_kaggle -> criteo_1tb"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_on_the_same_directory_are_named(
    criteo: SimpleNamespace,
    tmp_path: Path,
    small_parts: None,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    named: str,
    finished: bool,
) -> None:
    settings = settings_for(tmp_path, criteo.make_tsv(50))
    if finished:
        prepare(settings)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(module, "_count", _raise_killed)
            with pytest.raises(Killed):
                prepare(settings)
    before = criteo.tree(settings.output)
    with pytest.raises(ConfigError, match="with other settings") as caught:
        prepare(settings_for(tmp_path, b"", **change))
    assert named in str(caught.value)
    assert criteo.tree(settings.output) == before


def _raise_killed(*args: object) -> Iterator[None]:
    raise Killed


def test_a_changed_input_is_named(criteo: SimpleNamespace, tmp_path: Path, small_parts: None) -> None:
    settings = settings_for(tmp_path, criteo.make_tsv(50), criteo.make_tsv(20))
    prepare(settings)
    settings.inputs[1].write_bytes(criteo.make_tsv(21))
    with pytest.raises(ConfigError, match="input_1") as caught:
        prepare(settings)
    assert "input_0" not in str(caught.value)


def test_f1_bad_row_stops_or_is_recorded(criteo: SimpleNamespace, tmp_path: Path, small_parts: None) -> None:
    lines = criteo.make_tsv(300).splitlines()
    lines[77] = b"\xff\x00junk"
    lines[205] += b"\t"
    text = b"\n".join(lines) + b"\n"
    with pytest.raises(DataError, match=r"input_0, line 78 .*NUL") as caught:
        prepare(settings_for(tmp_path, text))
    assert "--bad_rows skip" in str(caught.value)
    # the parts parsed before the bad row are kept and the same directory goes on with skip
    result = prepare(settings_for(tmp_path, text, bad_rows="skip"))
    assert (result.stats["rejects"], sum(result.stats["rows"].values())) == (2, 298)
    assert result.stats["sources"][0]["rejects"] == 2
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["content"]) for entry in rejects] == [
        (78, "\\xff\x00junk"),
        (206, lines[205].decode()),
    ]
    for entry in rejects:
        assert entry["file"] == str(tmp_path / "input_0")
        assert text[: entry["byte_offset"]].count(b"\n") == entry["line"] - 1
    log = ClickLog.open(tmp_path / "out")
    good = criteo.oracle_file(text)[0]
    labels = np.concatenate([criteo.epoch(log, split, 64)[:, 0] for split in ("train", "val")])
    assert labels.tolist() == [row[0] for row in good]


@pytest.mark.parametrize(("allowed", "passes"), [(2, True), (1, False), (0, False)])
def test_max_bad_rows(
    criteo: SimpleNamespace, tmp_path: Path, small_parts: None, allowed: int, passes: bool
) -> None:
    text = criteo.make_tsv(120) + b"x\n" + criteo.make_tsv(120) + b"y\n"
    settings = settings_for(tmp_path, text, bad_rows="skip", max_bad_rows=allowed)
    if passes:
        assert prepare(settings).stats["rejects"] == 2
        return
    with pytest.raises(DataError, match=f"more than --max_bad_rows {allowed} bad rows") as caught:
        prepare(settings)
    assert f"line {242 if allowed else 121} " in str(caught.value)


def test_rejects_of_an_interrupted_skip_are_not_forgotten_by_error(
    criteo: SimpleNamespace, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = b"x\n" + criteo.make_tsv(120)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_count", _raise_killed)
        with pytest.raises(Killed):
            prepare(settings_for(tmp_path, text, bad_rows="skip"))
    with pytest.raises(ConfigError, match="1 bad rows were left out so far"):
        prepare(settings_for(tmp_path, text))
    with pytest.raises(ConfigError, match="1 bad rows were already left out"):
        prepare(settings_for(tmp_path, text, bad_rows="skip", max_bad_rows=0))


def test_no_good_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no good row in 2 lines"):
        prepare(settings_for(tmp_path, b"a\nb\n", bad_rows="skip"))


def test_a_full_disk_says_so_and_the_run_can_go_on(
    criteo: SimpleNamespace, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path, criteo.make_tsv(300))

    def full(source: Any, target: Any) -> None:
        if "train" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(DataError, match=r"disk is full; .* same command again"):
            prepare(settings)
    assert prepare(settings).stats["rows"]["train"] == 270


def test_free_space_is_checked_first(
    criteo: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(ConfigError, match="GB of disk"):
        prepare(settings_for(tmp_path, criteo.make_tsv(10)))
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_two_commands_cannot_write_one_directory(criteo: SimpleNamespace, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, criteo.make_tsv(10))

    def second(*args: object) -> Any:
        with pytest.raises(ConfigError, match="another `recemb prepare` is writing"):
            prepare(settings)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_count", second)
        with pytest.raises(Killed):
            prepare(settings)
    assert not prepare(settings).already_done


def test_output_that_holds_something_else_is_refused(criteo: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="holds other files"):
        prepare(settings_for(tmp_path, criteo.make_tsv(10)))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match="is a file"):
        prepare(settings_for(tmp_path, b"", output=tmp_path / "input_0"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"min_count": 0}, "--min_count 0"),
        ({"max_ind_range": 1}, "--max_ind_range 1"),
        ({"bad_rows": "drop"}, "--bad_rows 'drop'"),
        ({"max_bad_rows": -1}, "--max_bad_rows -1"),
        ({"memory_budget": 1000}, "--memory_budget 1000"),
        ({"dataset_name": "avazu"}, "--dataset_name 'avazu'"),
        ({"val_fraction": Fraction(1)}, "--val_fraction"),
        ({"val_fraction": Fraction(1, 2), "test_fraction": Fraction(1, 2)}, "leave no row to train on"),
        ({"inputs": ()}, "--input"),
    ],
)
def test_bad_settings_name_the_flag(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PrepareSettings(**{"inputs": (tmp_path / "t",), "output": tmp_path / "o", **options})
    assert named in str(caught.value)


def test_bad_inputs_are_named_before_anything_is_written(criteo: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(criteo.make_tsv(10))
    (tmp_path / "link").symlink_to(path)
    for inputs, error, reason in [
        ((tmp_path / "absent",), DataError, "absent: No such file"),
        ((tmp_path,), DataError, "is no file"),
        ((path, tmp_path / "link"), ConfigError, "given twice"),
    ]:
        with pytest.raises(error, match=reason):
            prepare(PrepareSettings(inputs=inputs, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_input_that_changes_while_it_is_read_is_refused(
    criteo: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path, criteo.make_tsv(30))
    parse = raw_log.RawLog.parse

    def and_append(self: raw_log.RawLog, progress: bool) -> None:
        parse(self, progress)
        with open(settings.inputs[0], "ab") as handle:
            handle.write(criteo.make_tsv(1, seed=9))

    monkeypatch.setattr(raw_log.RawLog, "parse", and_append)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(settings)
    assert not (tmp_path / "out" / "stats.json").exists()


def test_too_few_rows_for_a_validation_split(criteo: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--val_fraction 1/10 of 5 rows"):
        prepare(settings_for(tmp_path, criteo.make_tsv(5)))


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
