"""``recemb train --nproc_per_node``, started for real: torch's launcher, two ranks, their exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.faults.conftest import PATIENCE, ROOT, Launcher, distance, environment, result


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "recemb", *words, "--nproc_per_node", "2"]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        text=True,
        capture_output=True,
        timeout=2 * PATIENCE,
        check=False,
    )


def test_it_trains_as_ranks_that_are_started_one_by_one(launcher: Launcher, tmp_path: Path) -> None:
    launched, by_hand = tmp_path / "launched", tmp_path / "by hand"
    done = run(launcher.arguments(launched, limit_train_batches=6))
    assert done.returncode == 0, done.stderr
    assert "2 ranks on cpu, 2 x 100 = 200 rows a step" in done.stdout + done.stderr
    assert launcher.train(by_hand, 2, limit_train_batches=6).codes == [0, 0]
    assert distance(launched, by_hand) == 0
    assert result(launched)["world_size"] == 2
    assert result(launched)["sharding"] == result(by_hand)["sharding"]


def test_its_exit_code_is_the_ranks(launcher: Launcher, tmp_path: Path) -> None:
    done = run(launcher.arguments(tmp_path / "run", data_dir="absent"))
    assert done.returncode == 3, done.stderr
    assert "absent: no prepared click log" in done.stderr
