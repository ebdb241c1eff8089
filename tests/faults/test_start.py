"""Ranks that were started differently, or that cannot meet, are refused before anything is trained."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from recemb.errors import ConfigError
from recemb.training.distributed import Launch
from tests.faults.conftest import Launcher, rank_environment

TORCHRUN = rank_environment(1, 4, 29500)


@pytest.mark.parametrize(
    ("hooks", "each", "wanted"),
    [
        ({}, {1: {"seed": 5}}, ["settings", "seed: rank 0 has 0 and rank 1 has 5"]),
        ({}, {0: {"batch_size": 50}}, ["settings", "batch_size: rank 0 has 50 and rank 1 has 100"]),
        ({}, {1: {"learning_rate": 0.5, "epochs": 3}}, ["epochs: rank 0 has 1 and", "learning_rate: rank 0"]),
        ({1: {"action": "other_plan"}}, {}, ["sharding plans", "t_cat_3: rank 0 has table_wise on"]),
        ({1: {"action": "other_data"}}, {}, ["data", "features, rows and files: rank 0 has"]),
    ],
)
def test_f22_what_differs_is_named_with_both_values_on_every_rank(
    launcher: Launcher,
    tmp_path: Path,
    hooks: dict[int, dict[str, Any]],
    each: dict[int, dict[str, Any]],
    wanted: list[str],
) -> None:
    ended = launcher.train(tmp_path / "run", hooks=hooks, each=each)
    assert ended.codes == [2, 2]
    for log in ended.logs:
        assert "error: the ranks differ in their" in log
        for text in wanted:
            assert text in log
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "code", "wanted"),
    [
        ({"data_dir": "absent"}, 3, "absent: no prepared click log"),
    ],
)
def test_what_all_ranks_are_refused(
    launcher: Launcher, tmp_path: Path, flags: dict[str, Any], code: int, wanted: str
) -> None:
    ended = launcher.train(tmp_path / "run", **flags)
    assert ended.codes == [code, code]
    assert all(wanted in log for log in ended.logs)
    assert all("threads at the end: []" in log for log in ended.logs), ended.logs


def test_a_run_that_is_done_leaves_no_threads(launcher: Launcher, tmp_path: Path) -> None:
    ended = launcher.train(tmp_path / "run", limit_train_batches=2)
    assert ended.codes == [0, 0]
    assert all("threads at the end: []" in log for log in ended.logs), ended.logs


def test_a_plan_for_ranks_that_are_not_there(launcher: Launcher, tmp_path: Path) -> None:
    ended = launcher.train(tmp_path / "run", size=1, plan="plan.json")
    assert ended.codes == [2]
    assert "--plan plan.json spreads tables over ranks and this is one process" in ended.logs[0]


def test_slices_of_what_nobody_is_sent(launcher: Launcher, tmp_path: Path) -> None:
    ended = launcher.train(tmp_path / "run", size=1, communication_slices=2)
    assert ended.codes == [2]
    assert "--communication_slices 2 is of what ranks send each other" in ended.logs[0]


def test_f25_a_port_in_use(launcher: Launcher, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = launcher.train(tmp_path / "run", port=port, alone=True, dist_timeout_seconds=2)
    assert ended.codes == [2]
    assert f"rank 0 cannot meet the other ranks at MASTER_ADDR=127.0.0.1 MASTER_PORT={port}" in ended.logs[0]
    assert "--standalone" in ended.logs[0]
    assert "Traceback" not in ended.logs[0]


def test_f25_without_torchrun_it_is_one_process() -> None:
    alone = Launch()
    assert Launch.of({}) == alone
    assert Launch.of({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}) == alone
    assert Launch.of({"LOCAL_RANK": "3", "WORLD_SIZE": ""}) == alone
    assert Launch.of(TORCHRUN) == Launch(rank=1, size=4, local_rank=1, local_size=4)


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_f25_half_of_torchruns_variables(missing: str) -> None:
    variables = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(
        ConfigError, match=rf"WORLD_SIZE=4 is set and {missing} not; start the ranks with `to"
    ):
        Launch.of(variables)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": "two"}, r"WORLD_SIZE='two' is no number"),
        ({"RANK": "4"}, r"RANK=4, LOCAL_RANK=1: must be in \[0, WORLD_SIZE=4\)"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
    ],
)
def test_impossible_variables(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Launch.of(TORCHRUN | changes)


def test_f23_restarts_need_a_store_of_their_own() -> None:
    restarts = TORCHRUN | {"TORCHELASTIC_MAX_RESTARTS": "3"}
    with pytest.raises(ConfigError, match="--max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        Launch.of(restarts)
    assert Launch.of(restarts | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}).size == 4
    assert Launch.of(TORCHRUN | {"TORCHELASTIC_MAX_RESTARTS": "0"}).size == 4


def test_help_says_what_the_batch_is_of(capsys: pytest.CaptureFixture[str]) -> None:
    from recemb.cli.main import main

    assert main(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "with W ranks a step takes W x B rows" in shown
