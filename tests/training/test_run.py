"""Whole runs: the run directory, reproducibility, the dense twin, interruption, failure."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from recemb.errors import ConfigError, DataError, Interrupted, NonFiniteError
from recemb.training import loop as loop_module
from recemb.training.config import RunConfig, load_config
from recemb.training.report import load_runs
from recemb.training.run import train
from recemb.training.setup import build_model, choose_tables, open_log

MakeConfig = Callable[..., RunConfig]
METHODS = {"dense": None, "tt": 5, "qr": 2, "robe": 20, "md": 3}
REQUIRED_KEYS = {
    *("auc", "logloss", "ne", "calibration", "embedding_bytes", "dense_embedding_bytes"),
    *("compression_ratio", "samples_per_second", "step_ms_p50", "peak_rss_bytes", "seed", "versions"),
}


def read(path: Path) -> dict[str, Any]:
    result = json.loads((path / "result.json").read_text())
    assert isinstance(result, dict)
    return result


def weights(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path / "checkpoints" / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def timeless(result: dict[str, Any]) -> dict[str, Any]:
    clocks = ("samples_per_second", "step_ms_p50", "step_ms_p80", "train_seconds", "peak_rss_bytes")
    return {key: value for key, value in result.items() if key not in clocks}


@pytest.mark.parametrize("method", METHODS)
def test_run_directory(make_config: MakeConfig, method: str) -> None:
    config = make_config(method=method, compress_rate=METHODS[method])
    [path] = train(config)
    files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    weights_files = ["checkpoints/.lock", "checkpoints/model.safetensors"]
    assert files == [*weights_files, "metrics.jsonl", "resolved_config.yaml", "result.json"]
    assert (path / "report").is_dir()
    assert load_config({}, path / "resolved_config.yaml") == config

    result = read(path)
    assert set(result) >= REQUIRED_KEYS
    assert (result["split"], result["num_samples"], result["status"]) == ("test", 400, "completed")
    assert result["compression_ratio"] == result["dense_embedding_bytes"] / result["embedding_bytes"]
    assert result["embedding_bytes"] == sum(table["num_bytes"] for table in result["tables"])
    assert 0.4 < result["auc"] < result["best_auc"] + 0.1
    assert result["step_ms_p50"] > 0
    assert result["peak_rss_bytes"] > 10**8

    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 16]
    best = max(lines, key=lambda line: line["auc"])
    assert (result["best_step"], result["val"]["auc"]) == (best["step"], best["auc"])


@pytest.mark.parametrize("method", METHODS)
def test_checkpoint_holds_the_tables_and_loads_back(make_config: MakeConfig, method: str) -> None:
    config = make_config(method=method, compress_rate=METHODS[method], validation_freq_within_epoch=None)
    [path] = train(config)
    saved = weights(path)
    in_tables = sum(t.numel() * 4 for name, t in saved.items() if "embedding_bags" in name)
    assert in_tables == read(path)["embedding_bytes"]

    from safetensors.torch import load_model

    log = open_log(config)
    model = build_model(config, log, choose_tables(config, log))
    load_model(model, path / "checkpoints" / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in saved.items())


@pytest.mark.parametrize("method", METHODS)
def test_equal_seeds_give_equal_bits(make_config: MakeConfig, tmp_path: Path, method: str) -> None:
    def once(name: str, seed: int) -> Path:
        # Whatever state the caller's generator is in must not matter.
        torch.manual_seed(hash(name) % 1000)
        changes = {"method": method, "compress_rate": METHODS[method], "seed": seed, "epochs": 2}
        return train(make_config(output=str(tmp_path / name), **changes))[0]

    first, again, other = once("a", 1), once("b", 1), once("c", 2)
    one, two, three = weights(first), weights(again), weights(other)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert timeless(read(first)) == timeless(read(again))
    assert read(first)["auc"] != read(other)["auc"]
    assert any(not torch.equal(one[name], three[name]) for name in one)


def test_training_leaves_the_callers_torch_state_alone(make_config: MakeConfig) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(make_config(limit_train_batches=2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.are_deterministic_algorithms_enabled() == before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_compare_trains_the_twin_with_equal_dense_layers(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(method="tt", compress_rate=5, compare="dense", learning_rate=1e-30, optimizer="sgd")
    paths = train(config)
    assert [path.relative_to(tmp_path) for path in paths] == [Path("run/tt"), Path("run/dense")]
    small, dense = (weights(path) for path in paths)
    layers = [name for name in small if "embedding_bags" not in name]
    # The step is too small to move anything, so these are the initial weights.
    assert layers
    assert all(torch.equal(small[name], dense[name]) for name in layers)
    assert read(paths[1])["compression_ratio"] == 1.0
    assert read(paths[0])["compression_ratio"] > 4


def test_a_finished_run_is_not_overwritten_unasked(make_config: MakeConfig) -> None:
    [path] = train(make_config(limit_train_batches=1, seed=1))
    before = (path / "result.json").read_bytes()
    with pytest.raises(ConfigError, match=r"already holds the result of a run .*--overwrite"):
        train(make_config(limit_train_batches=1, seed=2))
    with pytest.raises(ConfigError, match="--overwrite"):
        train(make_config(method="tt", compress_rate=5, compare="dense"))
    assert (path / "result.json").read_bytes() == before
    train(make_config(limit_train_batches=1, seed=2, overwrite=True))
    assert read(path)["seed"] == 2
    assert load_config({}, path / "resolved_config.yaml").overwrite is False
    assert len((path / "metrics.jsonl").read_text().splitlines()) == 1


def test_compare_refuses_before_training_either(make_config: MakeConfig, tmp_path: Path) -> None:
    train(make_config(output=str(tmp_path / "run" / "dense"), limit_train_batches=1))
    with pytest.raises(ConfigError, match=r"run/dense already holds"):
        train(make_config(method="tt", compress_rate=5, compare="dense"))
    assert not (tmp_path / "run" / "tt").exists()


@pytest.mark.parametrize("how", ["plain", "resume", "overwrite"])
def test_a_run_hides_no_runs_below_it(make_config: MakeConfig, tmp_path: Path, how: str) -> None:
    paths = train(make_config(method="tt", compress_rate=5, compare="dense", limit_train_batches=1))
    flags = {} if how == "plain" else {how: True}
    with pytest.raises(ConfigError, match=r"holds runs in dense, tt, .* give another --output"):
        train(make_config(limit_train_batches=1, **flags))
    assert not (tmp_path / "run" / "result.json").exists()
    assert [path.name for path in paths] == ["tt", "dense"]
    assert len(load_runs([tmp_path / "run"])) == 2


def test_overwrite_replaces_the_compared_runs_and_no_others(make_config: MakeConfig, tmp_path: Path) -> None:
    root = tmp_path / "run"
    train(make_config(output=str(root / "qr"), limit_train_batches=1))
    for seed in (1, 2):
        # The first of them replaces nothing.
        train(
            make_config(
                method="tt",
                compress_rate=5,
                compare="dense",
                limit_train_batches=1,
                checkpoint_freq=1,
                overwrite=True,
                seed=seed,
            )
        )
        for name in ("tt", "dense"):
            assert (read(root / name)["status"], read(root / name)["seed"]) == ("completed", seed)
            assert list((root / name / "checkpoints").glob("step-*"))
    assert read(root / "qr")["status"] == "completed"


@pytest.mark.parametrize("resume", [False, True])
def test_compared_runs_are_not_hidden_by_one_above_them(
    make_config: MakeConfig, tmp_path: Path, resume: bool
) -> None:
    root = tmp_path / "run"
    train(make_config(limit_train_batches=1, checkpoint_freq=1))
    (root / "notes.txt").write_text("mine")
    before = (root / "result.json").read_bytes()
    flags = {"method": "tt", "compress_rate": 5, "compare": "dense", "limit_train_batches": 1}
    with pytest.raises(ConfigError, match=r"already holds a run of its own, .*--overwrite"):
        train(make_config(**flags, resume=resume))
    assert (root / "result.json").read_bytes() == before
    train(make_config(**flags, overwrite=True))
    assert sorted(path.name for path in root.iterdir()) == ["dense", "notes.txt", "tt"]
    assert len(load_runs([root])) == 2


def test_bad_requests_leave_no_trace(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prepared click log"):
        train(make_config(data_dir=str(tmp_path / "absent")))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="--device cuda"):
            train(make_config(device="cuda"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        train(make_config(output=str(tmp_path / "file")))
    with pytest.raises(ConfigError, match="cannot write"):
        train(make_config(output=str(tmp_path / "file" / "below")))
    assert not (tmp_path / "run").exists()


def test_f31_interruption_keeps_what_was_reached(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = loop_module.Trainer._train_step

    def step_then_signal(self: loop_module.Trainer, *args: Any) -> torch.Tensor:
        logits = original(self, *args)
        if self.outcome.steps == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return logits

    monkeypatch.setattr(loop_module.Trainer, "_train_step", step_then_signal)
    with pytest.raises(Interrupted, match=r"SIGTERM came after step 7; .*--overwrite"):
        train(make_config(method="tt", compress_rate=5, compare="dense"))
    result = read(tmp_path / "run" / "tt")
    assert (result["status"], result["steps"], result["best_step"]) == ("interrupted", 7, 5)
    assert result["auc"] == result["val"]["auc"]
    assert weights(tmp_path / "run" / "tt")
    assert not (tmp_path / "run" / "dense").exists()


@pytest.mark.parametrize("compare", [None, "dense"])
def test_f31_an_interrupted_run_with_checkpoints_is_to_be_resumed(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compare: str | None
) -> None:
    original = loop_module.Trainer._train_step

    def step_then_signal(self: loop_module.Trainer, *args: Any) -> torch.Tensor:
        if self._config.method == "dense" and self.outcome.steps == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    method = {"method": "tt", "compress_rate": 5, "compare": compare} if compare else {}
    config = make_config(checkpoint_freq=2, **method)
    path = tmp_path / "run" / (compare or "")
    with monkeypatch.context() as patch:
        patch.setattr(loop_module.Trainer, "_train_step", step_then_signal)
        with pytest.raises(Interrupted):
            train(config)
    assert read(path)["status"] == "interrupted"
    # With --compare the other run is complete by then, which --resume leaves as it is.
    with pytest.raises(ConfigError, match=rf"{path} holds the checkpoints .* did not end; give --resume"):
        train(config)
    train(config.model_copy(update={"resume": True}))
    with pytest.raises(ConfigError, match="already holds the result of a run"):
        train(config)


def test_interruption_before_any_evaluation(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop_module.Trainer._train_step

    def step_then_signal(self: loop_module.Trainer, *args: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args)

    monkeypatch.setattr(loop_module.Trainer, "_train_step", step_then_signal)
    config = make_config()
    with pytest.raises(Interrupted):
        train(config)
    result = read(Path(config.output))
    assert (result["auc"], result["split"], result["steps"]) == (None, None, 1)


def test_f13_divergence_names_the_best_checkpoint(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop_module.Trainer._train_step

    def step(self: loop_module.Trainer, *args: Any) -> torch.Tensor:
        if self.outcome.steps == 7:
            self._optimizer.param_groups[0]["lr"] = 1e30
        return original(self, *args)

    monkeypatch.setattr(loop_module.Trainer, "_train_step", step)
    config = make_config(optimizer="sgd")
    with pytest.raises(
        NonFiniteError, match=r"loss is .*\nThe best weights, of step 5, are in .*safetensors"
    ):
        train(config)
    assert all(value.isfinite().all() for value in weights(Path(config.output)).values())
    assert not (Path(config.output) / "result.json").exists()


def test_progress_is_one_line_per_evaluation_without_a_terminal(
    make_config: MakeConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    train(make_config(method="tt", compress_rate=5))
    lines = capfd.readouterr().err.strip().splitlines()
    assert lines[0].startswith("tt: 26 tables")
    steps = [line.split("  ")[0] for line in lines[1:]]
    assert steps == ["tt: step 5/16", "tt: step 10/16", "tt: step 15/16", "tt: step 16/16"]
    assert all("val AUC 0." in line and "samples/s" in line for line in lines[1:])


def test_the_result_tells_the_data_and_what_limits_leave_of_them(
    make_config: MakeConfig, log_dir: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(log_dir, tmp_path / "copy")
    [path] = train(make_config(limit_train_batches=3, limit_val_batches=9, test_batch_size=150))
    limits = {"limit_train_batches": 99, "limit_val_batches": 1, "limit_test_batches": 2}
    other = make_config(data_dir=str(copy), output=str(tmp_path / "b"), test_batch_size=150, **limits)
    one, two = read(path), read(train(other)[0])
    assert one["data"] == two["data"]
    assert (one["limited_rows"], one["steps_per_epoch"]) == ({"train": 600}, 3)
    assert (two["limited_rows"], two["steps_per_epoch"]) == ({"val": 150, "test": 300}, 16)


def test_shortfall_is_told(make_config: MakeConfig, capfd: pytest.CaptureFixture[str]) -> None:
    [path] = train(make_config(method="qr", compress_rate=10_000, limit_train_batches=1))
    assert "qr reaches" in read(path)["shortfall"]
    assert "qr: note: qr reaches" in capfd.readouterr().err
