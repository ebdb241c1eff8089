"""A run that is stopped and resumed equals one that is not, bit for bit (FAILURES F32)."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec.api import EnumerableShardingSpec
from torchrec.distributed.types import ParameterSharding

from recemb.checkpoint import shard_file
from recemb.cli.main import main
from recemb.errors import CheckpointError, ConfigError, Interrupted
from recemb.training import loop as loop_module
from recemb.training.config import RunConfig
from recemb.training.peers import _listen
from recemb.training.run import train
from recemb.training.sharded import _facts
from tests.faults.conftest import assert_same_run, result

MakeConfig = Callable[..., RunConfig]
METHODS = {"dense": None, "tt": 5, "qr": 2, "robe": 20, "md": 3}
# 8 steps an epoch, with evaluations after 5, 8, 13 and 16.
RUN: dict[str, Any] = {"epochs": 2, "limit_train_batches": 8}


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        *((method, {"optimizer": "adam"}) for method in METHODS),
        ("tt", {"optimizer": "adagrad"}),
        ("tt", {"optimizer": "rowwise_adagrad"}),
        ("dense", {"optimizer": "sgd", "shuffle_batches": False}),
        ("tt", {"cache_fraction": 0.05, "cache_refresh_every": 2}),
        ("md", {"cache_fraction": 0.05, "cache_policy": "lru", "cache_refresh_every": 3}),
    ],
)
def test_resumed_equals_unbroken(
    make_config: MakeConfig,
    stop_in: Callable[[str, int], None],
    tmp_path: Path,
    method: str,
    changes: dict[str, Any],
) -> None:
    settings = RUN | changes | {"method": method, "compress_rate": METHODS[method]}
    output = str(tmp_path / "run")
    # In a step, in the evaluation after step 8, and in a step that an evaluation follows.
    for place, steps, reached in (("_train_step", 2, 3), ("_evaluate", 8, 8), ("_train_step", 12, 13)):
        stop_in(place, steps)
        with pytest.raises(
            Interrupted, match=rf"after step {reached}; .*--resume to go on from step {reached}"
        ):
            train(make_config(output=output, resume=True, **settings))
    [path] = train(make_config(output=output, resume=True, **settings))
    [unbroken] = train(make_config(output=str(tmp_path / "unbroken"), **settings))
    assert_same_run(path, unbroken)
    if "cache_fraction" in changes:
        assert result(path)["caches"] == result(unbroken)["caches"]


def test_the_first_step_of_each_process_is_left_out_of_the_speed(
    make_config: MakeConfig, stop_in: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    record, begun = loop_module.Trainer._record_step, list[loop_module.Trainer]()

    def record_scripted(self: loop_module.Trainer, batch: Any, logits: Any, seconds: float) -> None:
        record(self, batch, logits, 0.5 if self in begun else 60.0)
        begun.append(self)

    monkeypatch.setattr(loop_module.Trainer, "_record_step", record_scripted)
    stop_in("_train_step", 4)
    with pytest.raises(Interrupted):
        train(make_config(resume=True, **RUN))
    [path] = train(make_config(resume=True, **RUN))
    found = result(path)
    # 14 of 16 steps of 200 rows, of half a second each.
    assert found["samples_per_second"] == pytest.approx(400)
    assert (found["step_ms_p50"], found["step_ms_p80"]) == (500, 500)
    assert found["train_seconds"] == 127


def test_early_stopping_and_best_weights_survive(
    make_config: MakeConfig, stop_in: Callable[[str, int], None], tmp_path: Path
) -> None:
    # Too fast: the best evaluation comes early, and the signal after it.
    settings = {"epochs": 3, "learning_rate": 0.3, "patience": 4, "optimizer": "adam"}
    stop_in("_train_step", 22)
    with pytest.raises(Interrupted):
        train(make_config(resume=True, **settings))
    [path] = train(make_config(resume=True, **settings))
    [unbroken] = train(make_config(output=str(tmp_path / "unbroken"), **settings))
    assert_same_run(path, unbroken)
    one = result(unbroken)
    assert one["best_step"] < 22
    assert one["stopped"] == result(path)["stopped"] is not None


def test_checkpoints_come_every_so_many_steps_and_at_the_end(make_config: MakeConfig) -> None:
    [path] = train(make_config(checkpoint_freq=3, **RUN))
    names = sorted(entry.name for entry in (path / "checkpoints").iterdir() if entry.is_dir())
    assert names == ["step-15", "step-16"]
    assert (path / "checkpoints" / "LATEST").read_text().strip() == "step-16"


def test_f28_a_full_disk_does_not_end_training(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    original, full = shard_file.write, [True]

    def write(path: Path, *rest: Any) -> Any:
        if full.pop() if full else False:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original(path, *rest)

    monkeypatch.setattr(shard_file, "write", write)
    [path] = train(make_config(checkpoint_freq=12, **RUN))
    assert result(path)["status"] == "completed"
    assert "warning: no checkpoint of step 12, training goes on" in capfd.readouterr().err
    assert [entry.name for entry in (path / "checkpoints").glob("step-*")] == ["step-16"]


@pytest.fixture
def fail_metrics(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int], int], None]:
    """Have writes of the metrics fail half through: those of these numbers, from 0, with this errno."""

    def install(failing: set[int], number: int) -> None:
        original, count = Path.open, iter(range(100))

        @contextmanager
        def half(stream: Any, fails: bool) -> Iterator[Any]:
            with stream:
                yield Half(stream) if fails else stream

        class Half:
            def __init__(self, stream: Any) -> None:
                self._stream = stream

            def write(self, text: str) -> None:
                self._stream.write(text[: len(text) // 2])
                raise OSError(number, os.strerror(number))

        def opened(self: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
            stream = original(self, mode, *rest, **named)
            appends = self.name == "metrics.jsonl" and mode == "a"
            return half(stream, next(count) in failing) if appends else stream

        monkeypatch.setattr(Path, "open", opened)

    return install


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("failing", [{0, 1}, {1, 3}], ids=["the first two", "the last too"])
def test_f35_evaluations_wait_for_room_on_a_full_disk(
    make_config: MakeConfig,
    fail_metrics: Callable[[set[int], int], None],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    failing: set[int],
    number: int,
) -> None:
    [unbroken] = train(make_config(output=str(tmp_path / "unbroken"), **RUN))
    capfd.readouterr()
    fail_metrics(failing, number)
    [path] = train(make_config(**RUN))
    assert_same_run(path, unbroken)
    assert capfd.readouterr().err.count("metrics.jsonl: the disk is full, training goes on") == 1


def test_f35_evaluations_that_wait_survive_a_stop(
    make_config: MakeConfig,
    stop_in: Callable[[str, int], None],
    fail_metrics: Callable[[set[int], int], None],
    tmp_path: Path,
) -> None:
    [unbroken] = train(make_config(output=str(tmp_path / "unbroken"), **RUN))
    # Those after steps 5 and 8, and what is tried once more at the end.
    fail_metrics({0, 1, 2}, errno.ENOSPC)
    stop_in("_train_step", 9)
    config = make_config(resume=True, **RUN)
    with pytest.raises(Interrupted, match="--resume to go on from step 10"):
        train(config)
    assert (Path(config.output) / "metrics.jsonl").read_text() == ""
    [path] = train(config)
    assert_same_run(path, unbroken)


def test_f35_a_broken_disk_still_ends_training(
    make_config: MakeConfig, fail_metrics: Callable[[set[int], int], None]
) -> None:
    fail_metrics({1}, errno.EIO)
    config = make_config(**RUN)
    with pytest.raises(ConfigError, match=r"cannot write: .*Input/output error"):
        train(config)
    lines = (Path(config.output) / "metrics.jsonl").read_text()
    assert lines.count("\n") == 1
    assert lines.endswith("}\n")


def test_more_epochs_go_on_from_the_last(make_config: MakeConfig, tmp_path: Path) -> None:
    first = RUN | {"epochs": 1, "checkpoint_freq": 8}
    [path] = train(make_config(**first))
    os.remove(path / "result.json")
    train(make_config(resume=True, **first | {"epochs": 2}))
    [unbroken] = train(make_config(output=str(tmp_path / "unbroken"), **RUN))
    assert_same_run(path, unbroken)


def test_a_signal_in_the_test_split_resumes_there(
    make_config: MakeConfig, stop_in: Callable[[str, int], None], tmp_path: Path
) -> None:
    stop_in("test", 16)
    with pytest.raises(Interrupted, match="--resume to go on from step 16"):
        train(make_config(checkpoint_freq=100, **RUN))
    [path] = train(make_config(checkpoint_freq=100, resume=True, **RUN))
    [unbroken] = train(make_config(output=str(tmp_path / "unbroken"), **RUN))
    assert_same_run(path, unbroken)


def test_a_signal_before_the_first_step(
    make_config: MakeConfig, stop_in: Callable[[str, int], None], tmp_path: Path
) -> None:
    stop_in("_train_epoch", 0)
    with pytest.raises(Interrupted, match=r"after step 0; .* Give the same command with --overwrite"):
        train(make_config(checkpoint_freq=2, **RUN))
    [path] = train(make_config(checkpoint_freq=2, resume=True, **RUN))
    [unbroken] = train(make_config(output=str(tmp_path / "unbroken"), **RUN))
    assert_same_run(path, unbroken)


def test_what_cannot_be_resumed(make_config: MakeConfig, stop_in: Callable[[str, int], None]) -> None:
    with pytest.raises(ConfigError, match="resume: overwrite is given too"):
        make_config(resume=True, overwrite=True)
    stop_in("_train_step", 4)
    with pytest.raises(Interrupted):
        train(make_config(**RUN))
    with pytest.raises(
        ConfigError, match=r"(?s)other settings.*optimizer: 'adam' in the checkpoint, 'sgd' now"
    ):
        train(make_config(resume=True, optimizer="sgd", **RUN))
    config = make_config(resume=True, **RUN)
    [shard] = (Path(config.output) / "checkpoints").glob("step-*/rank-*.safetensors")
    damaged = bytearray(shard.read_bytes())
    damaged[-5] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints can be loaded"):
        train(config)
    assert result(Path(config.output))["status"] == "interrupted"


def test_a_complete_run_is_left_as_it_is(
    make_config: MakeConfig, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = make_config(method="tt", compress_rate=5, compare="dense", limit_train_batches=2)
    first = train(config)
    before = (first[0] / "result.json").read_bytes()
    shutil.rmtree(first[1])
    assert train(config.model_copy(update={"resume": True})) == first
    assert (first[0] / "result.json").read_bytes() == before
    assert result(first[1])["status"] == "completed"
    shown = capfd.readouterr().err
    assert f"{first[0]} is complete; --resume leaves it as it is" in shown
    assert "dense: no checkpoint to resume from; starting anew" in shown


def test_a_complete_run_of_other_settings_is_not_taken_for_this_one(make_config: MakeConfig) -> None:
    config = make_config(limit_train_batches=2)
    (path,) = train(config)
    before = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    for change in ({"seed": 9}, {"epochs": 3}, {"learning_rate": 0.5}):
        with pytest.raises(ConfigError, match="no checkpoint to go on from; give another --output"):
            train(config.model_copy(update={"resume": True, **change}))
    assert {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()} == before


def test_a_complete_run_goes_on_with_more_epochs(make_config: MakeConfig) -> None:
    config = make_config(limit_train_batches=2, checkpoint_freq=1)
    (path,) = train(config)
    steps = result(path)["steps"]
    train(config.model_copy(update={"resume": True, "epochs": config.epochs + 1}))
    assert result(path)["steps"] == steps + 2


def test_f23_restarted_ranks_resume(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr("recemb.training.run.train", lambda config: seen.append(config) or [])
    monkeypatch.setattr("recemb.training.report.load_runs", lambda directories: [])
    monkeypatch.setattr("recemb.training.report.comparison_table", lambda runs: "")
    main(["train", "--data_dir", str(tmp_path), "--output", str(tmp_path / "out"), "--overwrite"])
    assert [(config.resume, config.overwrite) for config in seen] == [(True, True)]


def test_f22_plans_that_differ_in_a_kernel_differ() -> None:
    spec = EnumerableShardingSpec([ShardMetadata([0, 0], [4, 8], "rank:0/cpu")])
    fused, dense, narrow = (
        ParameterSharding("table_wise", kernel, [0], own)
        for kernel, own in (
            ("fused", spec),
            ("dense", spec),
            ("fused", EnumerableShardingSpec([ShardMetadata([0, 0], [4, 4], "rank:0/cpu")])),
        )
    )
    assert len({_facts(sharding) for sharding in (fused, dense, narrow)}) == 3
    assert _facts(fused) == _facts(ParameterSharding("table_wise", "fused", [0], spec))


def test_ranks_of_other_machines_reach_rank_0_whatever_its_own_name_is() -> None:
    with _listen("") as listener:
        for host in ("127.0.0.1", "::1") if socket.has_dualstack_ipv6() else ("127.0.0.1",):
            socket.create_connection((host, listener.getsockname()[1]), 5).close()
