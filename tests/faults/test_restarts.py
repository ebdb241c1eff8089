"""The README's commands, as they are typed: torchrun, and its restarts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.faults.conftest import ROOT, RUN, Launcher, assert_same_run, environment, result


def test_f23_torchrun_restarts_after_a_killed_rank_and_the_run_goes_on(
    launcher: Launcher, unbroken: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [
            *torchrun,
            "--max-restarts=1",
            "-m",
            "tests.faults.killed_once",
            *launcher.arguments(output, resume=True, **RUN),
        ],
        env=environment() | {"PYTHONUNBUFFERED": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "rank 1 died: it was killed" in done.stderr, done.stderr
    assert "no checkpoint to resume from; starting anew" in done.stderr, done.stderr
    assert f"going on from {output}{os.sep}checkpoints{os.sep}step-9" in done.stderr
    assert_same_run(output, unbroken)


def test_restarted_ranks_replace_the_run_that_compare_overwrites(launcher: Launcher, tmp_path: Path) -> None:
    """As one process does with --overwrite: the attempt before was killed while its model was built."""
    root = tmp_path / "run"
    assert launcher.train(root, limit_train_batches=1).codes == [0, 0]
    (root / "notes.txt").write_text("mine")
    flags: dict[str, Any] = {"compare": "dense", "limit_train_batches": 1}
    ended = launcher.train(root, restarts=1, overwrite=True, **flags)
    assert ended.codes == [0, 0], ended.logs
    assert sorted(path.name for path in root.iterdir()) == ["dense", "notes.txt", "tt"]


def test_restarted_ranks_go_on_with_their_run_and_overwrite_the_next(
    launcher: Launcher, tmp_path: Path
) -> None:
    root, straight = tmp_path / "run", tmp_path / "straight"
    flags: dict[str, Any] = {"compare": "dense", "limit_train_batches": 4, "checkpoint_freq": 1}
    assert launcher.train(root, seed=1, **flags).codes == [0, 0]
    killed = launcher.train(
        root, hooks={1: {"action": "kill", "place": "forward", "step": 2}}, overwrite=True, seed=2, **flags
    )
    assert killed.codes[1] == -signal.SIGKILL, killed.logs
    assert not (root / "tt" / "result.json").exists()
    ended = launcher.train(root, restarts=1, overwrite=True, seed=2, **flags)
    assert ended.codes == [0, 0], ended.logs
    assert f"tt: going on from {root / 'tt' / 'checkpoints' / 'step-'}" in ended.logs[0]
    assert launcher.train(straight, seed=2, **flags).codes == [0, 0]
    for name in ("tt", "dense"):
        assert_same_run(root / name, straight / name)


def test_restarted_ranks_overwrite_what_an_attempt_did_not_come_to(
    launcher: Launcher, tmp_path: Path
) -> None:
    """Not even the same run's checkpoints are gone on from, which --overwrite was to replace."""
    root = tmp_path / "run"
    flags: dict[str, Any] = {"limit_train_batches": 4, "checkpoint_freq": 1}
    assert launcher.train(root, **flags).codes == [0, 0]
    killed = launcher.train(root, hooks={1: {"action": "killed_in_building"}}, overwrite=True, **flags)
    assert killed.codes[1] == -signal.SIGKILL, killed.logs
    assert result(root)["steps"] == 4
    before = (root / "result.json").stat().st_mtime_ns
    ended = launcher.train(root, restarts=1, overwrite=True, **flags)
    assert ended.codes == [0, 0], ended.logs
    assert "going on" not in ended.logs[0]
    assert "is complete" not in ended.logs[0]
    assert (root / "result.json").stat().st_mtime_ns > before
    # Restarted once more, they have nothing left to replace.
    again = launcher.train(root, restarts=2, overwrite=True, **flags)
    assert "is complete; --resume leaves it as it is" in again.logs[0]
