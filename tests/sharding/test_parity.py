"""Two gloo ranks under DistributedModelParallel against the unsharded module on both batches together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.sharding.cases import BAD_ID, BATCH, CASES, COMPRESSED, PLACES, WORLD, Case, is_fused

# Sums over a batch are taken in another order: a few units in the last place of numbers around 1, after
# three steps whose smallest effect on a tensor is a thousand times that.
OUTPUTS, GRADIENTS, WEIGHTS, MOVED = 5e-7, 1e-7, 5e-7, 5e-4
SECONDS = 150
ROOT = Path(__file__).resolve().parents[2]
Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """What each rank found in each case; one pair of processes runs them all."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    logs = [(folder / f"log{rank}").open("w") for rank in range(WORLD)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.sharding.worker", str(rank), str(folder)],
            env=environment,
            cwd=ROOT,
            stdout=log,
            stderr=log,
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
    files = [folder / f"rank{rank}.json" for rank in range(WORLD)]
    missing = [path for path in files if not path.exists()]
    assert not missing, "".join((folder / f"log{rank}").read_text() for rank in range(WORLD))
    return [json.loads(path.read_text()) for path in files]


def _of(found: list[dict[str, dict[str, Any]]], name: str) -> Found:
    both = [rank[name] for rank in found]
    errors = [one["error"] for one in both if "error" in one]
    assert not errors, "\n".join(errors)
    return both


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_unsharded_module(found: list[dict[str, dict[str, Any]]], case: Case) -> None:
    both = _of(found, str(case))
    for one in both:
        assert one["keys"], "state-dict keys differ from the unsharded module's"
        assert one["outputs"] <= OUTPUTS
        assert one["gradients"] <= GRADIENTS
        assert max(one["weights"].values()) <= WEIGHTS, one["weights"]
        assert min(one["moved"].values()) >= MOVED, "the steps are too small for the bound to mean anything"
    every = {key for key in both[0]["moved"] if "embedding_bags" in key}
    fused = {key for key in every if is_fused(case, key)}
    assert set(both[0]["fused"]) | set(both[1]["fused"]) == fused
    for one in both:
        assert not set(one["dense"]) & fused, "the dense optimizer would step on a fused table again"
    stepped = {key for one in both for key in one["compared"]}
    owned = {key for key in every - fused if key.split(".")[2] in COMPRESSED}
    assert owned <= stepped, "a gradient of a compressed table was not compared"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_kernel_serves_all_compressed_tables_of_a_rank(
    found: list[dict[str, dict[str, Any]]], case: Case
) -> None:
    places = PLACES[case.place].values()
    for rank, one in enumerate(_of(found, str(case))):
        assert one["kernels"] == (rank in places) + (None in places)


def test_weights_come_back_into_the_unsharded_module(found: list[dict[str, dict[str, Any]]]) -> None:
    for one in _of(found, "round_trip"):
        assert max(one["weights"].values()) == 0
        assert "ebc.embedding_bags.robe_a.array" in one["weights"]


def test_replicas_start_equal(found: list[dict[str, dict[str, Any]]]) -> None:
    for one in _of(found, "round_trip"):
        assert one["replicas"] == 0
        assert one["spread"] > 0.1


def test_a_batch_size_per_feature(found: list[dict[str, dict[str, Any]]]) -> None:
    for one in _of(found, "variable"):
        assert one["outputs"] <= OUTPUTS
        assert max(one["weights"].values()) <= WEIGHTS, one["weights"]


def test_a_learning_rate_schedule_reaches_the_backward(found: list[dict[str, dict[str, Any]]]) -> None:
    both = _of(found, "schedule")
    for one in both:
        assert not one["stepped"], (
            "the kernels step; a hook's step would need a gradient of each table's size"
        )
        assert one["still"] == 0
        assert one["moves"] > 0.01
    for one, key in zip(both, ("tt.core_0", "qr.q"), strict=True):
        assert f"ebc.embedding_bags.{key}" in one["state"]
        assert f"ebc.embedding_bags.{key}" in one["watched"]


def test_the_sparse_pipeline_equals_the_plain_loop(found: list[dict[str, dict[str, Any]]]) -> None:
    for one in _of(found, "pipeline"):
        assert all(one["equal"].values()), one["equal"]
        assert all(shape[0] == BATCH for shape in one["shapes"])


def test_a_bad_id_is_named_where_it_is_and_hangs_nobody(found: list[dict[str, dict[str, Any]]]) -> None:
    bad, waiting = _of(found, "bad_id")
    assert bad["kind"] == "BatchError"
    for part in ("'f3'", "'qr'", str(BAD_ID), "sample 0"):
        assert part in bad["message"]
    assert waiting["kind"] == "RuntimeError"
    assert waiting["seconds"] < 25


def test_frozen_tables_and_half_precision(found: list[dict[str, dict[str, Any]]]) -> None:
    for rank, one in enumerate(_of(found, "frozen")):
        assert one["outputs"] <= OUTPUTS
        assert one["dtype"] == "torch.bfloat16"
        moved = {key.removeprefix("ebc.embedding_bags."): by for key, by in one["moved"].items()}
        assert moved["qr.q"] == moved["qr.r"] == moved["robe_a.array"] == 0
        assert moved["tt.core_0"] > 0
        assert moved["md.p"] > 0 or rank == 1
        assert not any("qr.q" in key or "robe_a" in key for key in one["asks"])


def test_a_state_of_another_table_is_refused_on_every_rank(found: list[dict[str, dict[str, Any]]]) -> None:
    for one in _of(found, "another_table"):
        assert "tt.core_1: the state to load has shape (3, 3)" in one["message"]
        assert max(by for key, by in one["moved"].items() if "embedding_bags" in key) == 0


def test_f32_a_checkpoint_of_another_plan_goes_on_as_if_it_had_not_been_interrupted(
    found: list[dict[str, dict[str, Any]]],
) -> None:
    both = _of(found, "checkpoint")
    for one in both:
        assert max(one["saved"].values()) == 0, "the unsharded module has loaded other weights"
        assert max(one["loaded"].values()) == 0
        assert max(one["trained"].values()) <= WEIGHTS, one["trained"]
        assert max(one["forgetful"].values()) > MOVED, "the optimizer's state made no difference"
    # The state of a compressed table's optimizer is on its rank alone.
    assert not {"ebc.embedding_bags.tt.core_0"} & set(both[1]["optimizer"])
    assert not {"ebc.embedding_bags.qr.q"} & set(both[0]["optimizer"])
