"""Files are whole or absent."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from recemb.errors import ConfigError
from recemb.files import write_text
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
