"""``prepare`` after a kill, a full disk, or beside other settings: it goes on, or says why it does not."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recemb.data import criteo as reader
from recemb.data import prepare as module
from recemb.data.click_log import ClickLog
from recemb.data.prepare import prepare
from recemb.data.prepare_settings import PrepareSettings
from recemb.errors import ConfigError, DataError
from tests.data.conftest import Killed, raise_killed, settings_for


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
            patch.setattr(module, "_count", raise_killed)
            with pytest.raises(Killed):
                prepare(settings)
    before = criteo.tree(settings.output)
    with pytest.raises(ConfigError, match="with other settings") as caught:
        prepare(settings_for(tmp_path, b"", **change))
    assert named in str(caught.value)
    assert criteo.tree(settings.output) == before


def test_a_changed_input_is_named(criteo: SimpleNamespace, tmp_path: Path, small_parts: None) -> None:
    settings = settings_for(tmp_path, criteo.make_tsv(50), criteo.make_tsv(20))
    prepare(settings)
    settings.inputs[1].write_bytes(criteo.make_tsv(21))
    with pytest.raises(ConfigError, match="input_1") as caught:
        prepare(settings)
    assert "input_0" not in str(caught.value)


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
