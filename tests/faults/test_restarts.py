"""The README's commands, as they are typed: torchrun, and its restarts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.faults.conftest import ROOT, RUN, Launcher, assert_same_run, environment


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
    assert "rank 1 died: it was killed" in done.stderr
    assert "no checkpoint to resume from; starting anew" in done.stderr
    assert f"going on from {output}{os.sep}checkpoints{os.sep}step-9" in done.stderr
    assert_same_run(output, unbroken)
