"""Four gloo processes: 1, 2 and 4 ranks save, 1, 2 and 4 load; then one of them dies in a save."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from recemb.checkpoint import latest_checkpoint
from tests.checkpoint.test_resharding import LAYOUTS, table
from tests.checkpoint.worker import KILLED, WORLD
from tests.processes import run_ranks

SECONDS = 90


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks have left."""
    folder = tmp_path_factory.mktemp("ranks")
    ended = run_ranks("tests.checkpoint.worker", WORLD, [folder], folder, SECONDS)
    expected = [-signal.SIGKILL if rank == KILLED else 0 for rank in range(WORLD)]
    assert ended.codes == expected, "".join(ended.said)
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
