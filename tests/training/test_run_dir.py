"""Files are whole or absent."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from recemb.errors import ConfigError
from recemb.files import write_text
from recemb.training.config import RunConfig
from recemb.training.run import train
from recemb.training.run_dir import RunDir, to_json


def test_json_is_strict() -> None:
    text = to_json({"a": math.nan, "b": [1.5, math.inf], "c": {"d": -math.inf}})
    assert json.loads(text) == {"a": None, "b": [1.5, None], "c": {"d": None}}


def test_a_failed_write_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ConfigError, match=r"--output .*: cannot write: .*No space left"):
        RunDir(tmp_path).write_result({})


def test_files_are_synced_before_they_get_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        events.append("sync")
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_text(tmp_path / "a", "x")
    assert events == ["sync", "rename", "sync"]


def test_create_removes_only_what_a_run_wrote(tmp_path: Path) -> None:
    directory = RunDir(tmp_path)
    directory.create("a: 1\n")
    directory.append_metrics({"step": 1})
    directory.write_result({"auc": 0.5})
    (tmp_path / "notes.txt").write_text("mine")
    directory.create("a: 2\n")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "resolved_config.yaml").read_text() == "a: 2\n"
    assert not (tmp_path / "result.json").exists()
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.fixture
def live_run(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that trains in ``tmp_path / "run"``, with a checkpoint and a line of metrics."""
    text = """
import sys
from pathlib import Path
from recemb.training.run_dir import RunDir
directory = RunDir(Path(sys.argv[1]))
directory.claim()
directory.create("a: 1")
directory.append_metrics({"step": 1})
(directory.checkpoints / "step-1").mkdir()
print("ready", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", text, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.mark.parametrize("flag", ["overwrite", "resume"])
def test_f33_a_live_run_is_neither_overwritten_nor_resumed(
    make_config: Callable[..., RunConfig], live_run: subprocess.Popen[str], tmp_path: Path, flag: str
) -> None:
    def content() -> dict[Path, str | None]:
        paths = (tmp_path / "run").rglob("*")
        return {path: path.read_text() if path.is_file() else None for path in paths}

    before = content()
    with pytest.raises(ConfigError, match=rf"--output .*another run saves .*pid {live_run.pid} on "):
        train(make_config(**{flag: True}))
    assert content() == before
