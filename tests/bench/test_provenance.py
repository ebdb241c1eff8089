"""The commit of a checkout, clean and changed, and the compiler."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from bench.accuracy import _write_csv
from bench.provenance import compiler_version, git, head_commit


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of one commit."""
    root = tmp_path / "checkout"
    (root / "bench" / "results").mkdir(parents=True)
    for name in ("source.py", "bench/results/ops.csv"):
        (root / name).write_text("old")
    git(tmp_path, "init", "--quiet", str(root))
    git(root, "add", ".")
    git(root, "-c", "user.name=n", "-c", "user.email=e", "commit", "--quiet", "-m", "m")
    return root


def test_a_changed_source_marks_the_commit_and_a_new_figure_does_not(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "--short", "HEAD").strip()
    assert head_commit(checkout) == commit
    for name in ("ops.csv", "train.csv"):
        (checkout / "bench" / "results" / name).write_text("new")
    assert head_commit(checkout) == commit
    (checkout / "source.py").write_text("new")
    assert head_commit(checkout) == f"{commit}+"


def test_there_is_no_commit_outside_a_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "unpacked").mkdir()
    assert head_commit(checkout / "unpacked") == "", "another project's commit"
    monkeypatch.setenv("PATH", "")
    assert head_commit(checkout) == "", "no git"


def test_the_compiler_is_named_without_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler_version()
    assert not compiler_version().startswith("/")
    monkeypatch.setattr("recemb_kernels.build.compiler", lambda: ())
    assert compiler_version() == "none"


def test_the_csv_of_accuracies_has_both(tmp_path: Path) -> None:
    _write_csv(tmp_path / "kaggle.csv", [])
    with (tmp_path / "kaggle.csv").open() as handle:
        assert {"compiler", "commit"} <= set(csv.DictReader(handle).fieldnames or ())
