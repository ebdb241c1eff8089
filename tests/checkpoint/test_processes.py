"""Four gloo processes: 1, 2 and 4 ranks save, 1, 2 and 4 load; then one of them dies in a save."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from recemb.checkpoint import latest_checkpoint
from tests.checkpoint.test_resharding import LAYOUTS, table
from tests.checkpoint.worker import KILLED, WORLD

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 90


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks have left."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    logs = [(folder / f"log{rank}").open("w") for rank in range(WORLD)]
    command = [sys.executable, "-m", "tests.checkpoint.worker"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(folder)], env=environment, cwd=ROOT, stdout=log, stderr=log
        )
        for rank, log in enumerate(logs)
    ]
    deadline = time.monotonic() + SECONDS
    try:
        for process in ranks:
            process.wait(timeout=max(1, deadline - time.monotonic()))
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
    codes = [process.returncode for process in ranks]
    expected = [-signal.SIGKILL if rank == KILLED else 0 for rank in range(WORLD)]
    assert codes == expected, "".join((folder / f"log{rank}").read_text() for rank in range(WORLD))
    return folder


@pytest.mark.parametrize("saves", [1, 2, 4])
@pytest.mark.parametrize("loads", [1, 2, 4])
def test_f32_any_number_of_processes_loads_what_any_number_saved(
    folder: Path, saves: int, loads: int
) -> None:
    for rank in range(loads):
        found = json.loads((folder / f"rank{rank}.json").read_text())
        assert found[f"{saves} -> {loads}"] is True


@pytest.mark.parametrize("saves", [1, 2, 4])
def test_f32_a_process_without_torch_distributed_loads_them(folder: Path, saves: int) -> None:
    found = latest_checkpoint(folder / f"by{saves}")
    assert found is not None
    full = table()
    model = {name: torch.zeros_like(full) for name in LAYOUTS}
    found.load({"model": model, "lr": 0.0}, ignore_unexpected=True)
    assert all(torch.equal(tensor, full) for tensor in model.values())


def test_f27_a_rank_that_is_killed_in_a_save_leaves_the_checkpoint_before(folder: Path) -> None:
    for rank in range(WORLD - 1):
        lost = json.loads((folder / f"lost{rank}.json").read_text())
        # The connection breaks at once; nobody waits for the timeout.
        assert lost["seconds"] < 20, lost
    names = {path.name for path in (folder / "by4").iterdir() if ".tmp-" not in path.name}
    assert names == {".lock", "LATEST", "step-1"}
    found = latest_checkpoint(folder / "by4")
    assert found is not None
    assert found.step == 1
