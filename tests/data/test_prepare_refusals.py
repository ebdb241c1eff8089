"""What ``prepare`` refuses: bad rows (F1), settings that do not go together, inputs that cannot be read."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from recemb.data import prepare as module
from recemb.data import raw_log
from recemb.data.click_log import ClickLog
from recemb.data.prepare import prepare
from recemb.data.prepare_settings import PrepareSettings
from recemb.data.synthetic import write_synthetic
from recemb.errors import ConfigError, DataError
from tests.data.conftest import Killed, raise_killed, settings_for


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
        patch.setattr(module, "_count", raise_killed)
        with pytest.raises(Killed):
            prepare(settings_for(tmp_path, text, bad_rows="skip"))
    with pytest.raises(ConfigError, match="1 bad rows were left out so far"):
        prepare(settings_for(tmp_path, text))
    with pytest.raises(ConfigError, match="1 bad rows were already left out"):
        prepare(settings_for(tmp_path, text, bad_rows="skip", max_bad_rows=0))


def test_no_good_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no good row in 2 lines"):
        prepare(settings_for(tmp_path, b"a\nb\n", bad_rows="skip"))


def test_free_space_is_checked_first(
    criteo: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(ConfigError, match="B of disk and 10 B are free"):
        prepare(settings_for(tmp_path, criteo.make_tsv(10)))
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_output_that_holds_something_else_is_refused(criteo: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="holds other files"):
        prepare(settings_for(tmp_path, criteo.make_tsv(10)))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match="is a file"):
        prepare(settings_for(tmp_path, b"", output=tmp_path / "input_0"))


@pytest.mark.parametrize(
    ("below", "reason"),
    [
        ("input_0/x", "Not a directory"),
        ("/proc/zz", "No such file or directory"),
        ("n" * 300, "File name too long"),
        ("loop", "Too many levels of symbolic links"),
    ],
)
def test_output_that_cannot_be_made_is_named(tmp_path: Path, below: str, reason: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    output = tmp_path / below
    message = re.escape(f"--output {output}: cannot write: {reason}; give another --output")
    with pytest.raises(ConfigError, match=message):
        prepare(settings_for(tmp_path, b"", output=output))
    with pytest.raises(ConfigError, match=message):
        write_synthetic(output, 100)


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
