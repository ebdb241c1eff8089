"""F32: a checkpoint moves between one process and several to the bit, whatever optimizer the tables have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from recemb.training.metrics import ClickMetrics
from tests.faults.conftest import RUN as CHECKPOINTED
from tests.faults.conftest import Ended, Launcher

# The compressed tables lie beside 21 of at most 200 rows, which are left as they are.
RUN: dict[str, Any] = CHECKPOINTED | {"checkpoint_freq": 0}
UNCOMPRESSED = 21
STOP = {"action": "terminate", "place": "forward", "step": 3}


def contents(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, put together from the ranks' files; the clock is left out."""
    found = {}
    for key, stored in json.loads((path / "manifest.json").read_text())["manifest"]["tensors"].items():
        parts = []
        for shard in stored["shards"]:
            with safe_open(path / shard["file"], "pt") as file:
                parts.append((shard, file.get_tensor(shard["name"])))
        found[key] = torch.empty(stored["shape"], dtype=parts[0][1].dtype)
        for shard, part in parts:
            box = zip(shard["offsets"], shard["sizes"], strict=True)
            found[key][tuple(slice(start, start + size) for start, size in box)] = part
    # Sums over ranks leave carries between the limbs of one number.
    counts = ClickMetrics.from_counts(found["train_metrics"].numpy()).counts()
    found["train_metrics"] = torch.from_numpy(counts)
    return {key: value for key, value in found.items() if key != "step_ms"}


class Runs:
    """A run on other numbers of processes, each going on from a copy of another's checkpoint of step 4."""

    def __init__(self, launcher: Launcher, folder: Path, **flags: Any) -> None:
        self._launcher, self._folder, self._flags = launcher, folder, RUN | flags

    def start(self, size: int, plan: str | None = None) -> Path:
        """Train on ``size`` processes until step 4; the checkpoint."""
        output = self._folder / f"start-{size}-{plan}"
        ended = self._train(output, size, STOP | {"plan": plan})
        assert ended.codes == [75] * size, ended.logs
        return output / "checkpoints" / "step-4"

    def go_on(self, checkpoint: Path, size: int, plan: str | None = None) -> Path:
        """What ``size`` processes save of a checkpoint before they go on with it until the end."""
        output = self._folder / f"go-on-{size}-{plan}"
        ended = self.resume(checkpoint, output, size, plan)
        assert ended.codes == [0] * size, ended.logs
        return output / "checkpoints" / "again" / "step-4"

    def resume(self, checkpoint: Path, output: Path, size: int, plan: str | None) -> Ended:
        shutil.copytree(checkpoint.parent, output / "checkpoints")
        return self._train(output, size, {"action": "save_again", "plan": plan}, resume=True)

    def _train(self, output: Path, size: int, hook: dict[str, Any], **more: Any) -> Ended:
        if size == 1:
            hook = hook | {"plan": None}
        hooks = dict.fromkeys(range(size), hook)
        return self._launcher.train(output, size, hooks, batch_size=240 // size, **self._flags, **more)


@pytest.fixture
def runs(launcher: Launcher, tmp_path: Path, request: pytest.FixtureRequest) -> Runs:
    return Runs(launcher, tmp_path, **request.param)


OPTIMIZERS = [{"optimizer": "adagrad"}, {"optimizer": "rowwise_adagrad"}]
by_optimizer = pytest.mark.parametrize(
    "runs", OPTIMIZERS, indirect=True, ids=lambda flags: flags["optimizer"]
)


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@by_optimizer
@pytest.mark.parametrize("plan", [None, "row_wise", "data_parallel"])
def test_f32_from_one_process_to_two_and_back(runs: Runs, plan: str | None) -> None:
    first = runs.start(1)
    before = contents(first)
    sums = [value for key, value in before.items() if key.endswith(".weight/sum") and "bags.t_cat" in key]
    assert len(sums) == UNCOMPRESSED
    assert all(bool((value > 0).any()) for value in sums)
    two = runs.go_on(first, 2, plan)
    assert_equal(contents(two), before)
    assert_equal(contents(runs.go_on(two, 1)), before)


@by_optimizer
@pytest.mark.parametrize("plan", [None, "row_wise"])
def test_f32_what_two_have_trained_goes_on_in_one(runs: Runs, plan: str | None) -> None:
    first = runs.start(2, plan)
    one = runs.go_on(first, 1)
    assert_equal(contents(one), contents(first))
    assert_equal(contents(runs.go_on(one, 2)), contents(first))


@pytest.mark.parametrize(
    "runs",
    [flags | {"embedding_dim": 8, "dense_arch_layer_sizes": "8,8"} for flags in OPTIMIZERS],
    indirect=True,
)
def test_f32_sums_of_column_shards(runs: Runs, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Adagrad's are of the elements; row-wise Adagrad's are of each shard's columns, and move to no other."""
    first = runs.start(2, "column_wise")
    before = contents(first)
    assert_equal(contents(runs.go_on(first, 2, "column_wise")), before)
    if request.node.callspec.params["runs"]["optimizer"] == "adagrad":
        assert_equal(contents(runs.go_on(first, 1)), before)
        return
    for size, plan in ((1, None), (2, None)):
        ended = runs.resume(first, tmp_path / f"refused-{size}", size, plan)
        assert ended.codes == [2] * size, ended.logs
        for log in ended.logs:
            assert "column shards, each with row-wise Adagrad's sums of its own: {'t_cat_" in log
            assert "[4, 4]" in log
            assert "None now" in log
