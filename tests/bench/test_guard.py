"""Red tests forbid a figure; green ones are remembered for the same sources on the same system."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.guard import require_green, source_hash
from recemb.errors import ConfigError


def _tests(folder: Path, body: str) -> str:
    path = folder / "test_something.py"
    path.write_text(f"from pathlib import Path\n\n\ndef test_it():\n    {body}\n")
    return str(path)


def test_red_tests_are_named_and_leave_no_stamp(tmp_path: Path) -> None:
    stamps = tmp_path / "stamps"
    stamps.mkdir()
    tests = _tests(tmp_path, "assert 1 == 2")
    with pytest.raises(ConfigError, match=r"tests are red: FAILED .*test_something.py::test_it"):
        require_green([tests], stamps)
    assert not list(stamps.iterdir())


def test_green_tests_run_once_for_the_same_sources(tmp_path: Path) -> None:
    stamps, runs = tmp_path / "stamps", tmp_path / "runs"
    stamps.mkdir()
    tests = _tests(tmp_path, f"Path({str(runs)!r}).open('a').write('x')")
    first = require_green([tests], stamps)
    assert first == f"{source_hash([tests])} {tests}", "other tests than by default are named"
    assert require_green([tests], stamps) == first
    assert runs.read_text() == "x"
    other = _tests(tmp_path, f"Path({str(runs)!r}).open('a').write('xy')")
    assert source_hash([other]) != first
    require_green([other], stamps)
    assert runs.read_text() == "xxy"


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("versions", lambda: {"torch": "2.0"}),
        ("_cpu", lambda: "model name: another"),
        ("compiler_version", lambda: "g++ 1.0"),
    ],
)
def test_another_system_is_tested_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, other: object
) -> None:
    stamps, runs = tmp_path / "stamps", tmp_path / "runs"
    stamps.mkdir()
    tests = _tests(tmp_path, f"Path({str(runs)!r}).open('a').write('x')")
    first = require_green([tests], stamps)
    monkeypatch.setattr(f"bench.guard.{name}", other)
    assert require_green([tests], stamps) == first, "the sources are the same"
    assert runs.read_text() == "xx"


def test_a_missing_test_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--tests nowhere\.py: no such file"):
        require_green(["nowhere.py"], tmp_path)
