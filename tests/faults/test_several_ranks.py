"""Two ranks take the steps that one process takes with a batch of twice the size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from recemb.cli.main import main
from tests.faults.conftest import Launcher, distance, evaluations, result, weights

# Adam and Adagrad divide by the size of a gradient's own history, which makes a rounding of tiny ones large.
CASES = [
    ("tt", 5, "adam", {}, 1e-6),
    ("dense", None, "rowwise_adagrad", {}, 2e-6),
    ("robe", 20, "sgd", {"interaction_type": "dcn", "dcn_low_rank_dim": 4}, 1e-6),
    ("qr", 2, "adagrad", {}, 1e-5),
    ("md", 3, "adam", {"num_embeddings": 50}, 1e-6),
]


@pytest.mark.parametrize(("method", "rate", "optimizer", "more", "tolerance"), CASES)
def test_two_ranks_equal_one_process(
    launcher: Launcher,
    tmp_path: Path,
    method: str,
    rate: int | None,
    optimizer: str,
    more: dict[str, Any],
    tolerance: float,
) -> None:
    """3,200 rows in steps of 600, so that the last has 200 and none of them on rank 1 (F9, F21)."""
    flags = {"method": method, "compress_rate": rate, "optimizer": optimizer, "epochs": 2} | more
    flags |= {"validation_freq_within_epoch": 4}
    one, two = tmp_path / "one", tmp_path / "two"
    assert launcher.train(one, 1, batch_size=600, test_batch_size=350, **flags).codes == [0]
    slices = {"communication_slices": 3} if method == "qr" else {}
    ended = launcher.train(two, 2, batch_size=300, test_batch_size=90, **flags, **slices)
    assert ended.codes == [0, 0], ended.logs
    assert distance(one, two) < tolerance
    single, both = result(one), result(two)
    for name in ("steps", "epochs", "train_samples", "num_samples", "best_step", "embedding_bytes"):
        assert single[name] == both[name]
    assert single["train_samples"] == 6400
    for name in ("auc", "logloss", "ne", "calibration"):
        assert both[name] == pytest.approx(single[name], abs=1e-5)
    assert [(each["step"], each["best"]) for each in evaluations(one)] == [
        (each["step"], each["best"]) for each in evaluations(two)
    ]
    for mine, theirs in zip(evaluations(one), evaluations(two), strict=True):
        assert mine["train_auc"] == pytest.approx(theirs["train_auc"], abs=1e-4)
        assert mine["num_samples"] == theirs["num_samples"]
    assert (both["world_size"], single["world_size"]) == (2, 1)
    assert single["sharding"] is None
    assert {place.split()[-1] for place in both["sharding"].values()} == {"0", "1"}
    assert "2 ranks on cpu, 2 x 300 = 600 rows a step" in ended.logs[0]
    assert "AUC" not in ended.logs[1]


# Adagrad's eps keeps gradients near rounding from steps of the full rate, which differ from CPU to CPU.
CACHED = [
    ("tt", 4, "adagrad", "importance", {"eps": 1e-5}),
    ("robe", 8, "rowwise_adagrad", "lfu", {"limit_train_batches": 30}),
    ("md", 3, "adam", "lru", {}),
]


@pytest.mark.parametrize(("method", "rate", "optimizer", "policy", "more"), CACHED)
def test_cached_tables(
    launcher: Launcher,
    tmp_path: Path,
    method: str,
    rate: int,
    optimizer: str,
    policy: str,
    more: dict[str, Any],
) -> None:
    """The caches of both ranks' tables hold what one process's hold, and are reported by rank 0."""
    flags = {"method": method, "compress_rate": rate, "optimizer": optimizer, "limit_train_batches": 12}
    flags |= {"cache_fraction": 0.05, "cache_policy": policy, "cache_refresh_every": 3} | more
    one, two = tmp_path / "one", tmp_path / "two"
    assert launcher.train(one, 1, batch_size=200, **flags).codes == [0]
    ended = launcher.train(two, 2, batch_size=100, **flags)
    assert ended.codes == [0, 0], ended.logs
    assert distance(one, two) < 1e-5
    mine, theirs = weights(one), weights(two)
    ids = [name for name in mine if name.endswith("cache.ids")]
    assert len(ids) > 4
    assert all(torch.equal(mine[name], theirs[name]) for name in ids)
    single, both = result(one), result(two)
    assert single["cache_evictions"] > 30
    assert single["caches"].keys() == both["caches"].keys()
    for name, figures in single["caches"].items():
        assert both["caches"][name] == pytest.approx(figures, abs=1e-4)
    for each, other in zip(evaluations(one), evaluations(two), strict=True):
        assert other["cache_hit_rate"] == pytest.approx(each["cache_hit_rate"])
        assert other["cache_evictions"] == each["cache_evictions"]


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_replicated_tables(launcher: Launcher, tmp_path: Path, optimizer: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    flags: dict[str, Any] = {"limit_train_batches": 6, "optimizer": optimizer}
    replicate = {"plan": "data_parallel"}
    ended = launcher.train(two, hooks={0: replicate, 1: replicate}, batch_size=100, **flags)
    assert ended.codes == [0, 0], ended.logs
    assert set(result(two)["sharding"].values()) == {"data_parallel on 0,1"}
    assert launcher.train(one, 1, batch_size=200, **flags).codes == [0]
    # A replica's Adam moves all rows: those without a gradient go on as they went.
    assert distance(one, two) < (2e-6 if optimizer == "rowwise_adagrad" else 6 * 0.001)


def test_row_wise_tables_of_a_plan(launcher: Launcher, log_dir: Path, tmp_path: Path) -> None:
    """``recemb plan`` cuts tables by rows; the last of 11 steps has 150 rows on rank 0 and 50 on rank 1."""
    flags: dict[str, Any] = {"method": "qr", "compress_rate": 2, "optimizer": "adam", "embedding_dim": 8}
    flags |= {"dense_arch_layer_sizes": "8,8", "over_arch_layer_sizes": "8,1"}
    config, plan, one, two = (tmp_path / name for name in ("config.yaml", "plan.json", "one", "two"))
    lines = {"data_dir": log_dir, "output": two, "batch_size": 150} | flags
    config.write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    asked = ["plan", "--config", config, "--world_size", 2, "--device", "cpu", "--ddr", "20MB"]
    assert main([*map(str, asked), "--output", str(plan)]) == 0
    ended = launcher.train(two, 2, batch_size=150, test_batch_size=90, plan=plan, **flags)
    assert ended.codes == [0, 0], ended.logs
    assert sum(place.startswith("row_wise") for place in result(two)["sharding"].values()) > 1
    assert launcher.train(one, 1, batch_size=300, test_batch_size=350, **flags).codes == [0]
    assert distance(one, two) < 1e-6
    single, both = result(one), result(two)
    assert (both["steps"], both["train_samples"]) == (single["steps"], single["train_samples"])
    for name in ("auc", "logloss"):
        assert both[name] == pytest.approx(single[name], abs=1e-5)


@pytest.mark.parametrize(
    ("method", "rate", "more"),
    [
        ("dense", None, {"optimizer": "rowwise_adagrad"}),
        ("dense", None, {"optimizer": "adagrad", "plan": "data_parallel"}),
        ("qr", 2, {"optimizer": "adagrad", "plan": "data_parallel"}),
        ("tt", 4, {"optimizer": "adagrad", "cache_fraction": 0.05}),
        ("robe", 20, {"optimizer": "sgd"}),
    ],
)
def test_ranks_keep_nothing_of_the_whole_models_tables(
    launcher: Launcher, tmp_path: Path, method: str, rate: int | None, more: dict[str, Any]
) -> None:
    """They would come on top of what a plan has counted."""
    flags = {"method": method, "compress_rate": rate, "limit_train_batches": 2} | more
    hook = {"action": "count_left_over", "plan": flags.pop("plan", None)}
    ended = launcher.train(tmp_path / "run", hooks={0: hook, 1: hook}, **flags)
    assert ended.codes == [0, 0], ended.logs
    for log in ended.logs:
        counted = re.search(r"of (\d+) bytes in (\d+) tensors are left over: {}", log)
        assert counted, log
        # The hook has seen 26 tables, those of ROBE in one array, and what their optimizers start with.
        assert int(counted[1]) > 10_000
        assert int(counted[2]) > 20


def test_compare_trains_both_on_all_ranks(launcher: Launcher, tmp_path: Path) -> None:
    ended = launcher.train(tmp_path / "run", compare="dense", limit_train_batches=3)
    assert ended.codes == [0, 0], ended.logs
    assert result(tmp_path / "run" / "tt")["world_size"] == 2
    assert result(tmp_path / "run" / "dense")["compression_ratio"] == 1
    assert "tt 5x" in ended.logs[0]
