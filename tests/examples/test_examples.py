"""The scripts in examples/ run as they are and print what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("swap_the_import.py", ["step 20", "t_user", "total"]),
        ("methods_per_table.py", ["dense", "robe", "relative error of the import"]),
        ("train_criteo.py", ["dense", "tt 20x", "best possible AUC"]),
    ],
)
def test_example_runs(script: str, expected: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for text in expected:
        assert text in done.stdout


def test_examples_are_short() -> None:
    for script in (ROOT / "examples").glob("*.py"):
        assert len(script.read_text().splitlines()) < 60, script.name
