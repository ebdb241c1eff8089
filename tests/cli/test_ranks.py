"""``--nproc_per_node``: what is handed to torch's launcher, and which exit code comes back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api

from recemb.cli.main import build_parser, main
from recemb.cli.ranks import words_of

FLAGS = ["--data_dir", "data", "--output", "runs/a", "--seed", "3", "--no-shuffle_batches", "--resume"]
Start = Callable[[BaseException | None], list[Any]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Stand in for the launcher; it raises what it is given, and notes what it was asked for."""
    for name in ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "OMP_NUM_THREADS", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def prepare(outcome: BaseException | None) -> list[Any]:
        asked: list[Any] = []

        def elastic_launch(config: Any, program: str) -> Callable[..., None]:
            def run(*words: str) -> None:
                asked.extend([config, os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE"), list(words)])
                if outcome is not None:
                    raise outcome

            return run

        monkeypatch.setattr(api, "elastic_launch", elastic_launch)
        return asked

    return prepare


def test_the_same_flags_reach_every_rank(start: Start) -> None:
    asked = start(None)
    assert main(["train", "--nproc_per_node", "3", "--max_restarts", "2", *FLAGS]) == 0
    config, own_store, words = asked
    assert (config.nproc_per_node, config.max_restarts, config.max_nodes) == (3, 2, 1)
    assert own_store == "1"
    assert words[:2] == ["-m", "recemb"]
    parser = build_parser()
    assert vars(parser.parse_args(words[2:])) == vars(parser.parse_args(["train", *FLAGS]))


@pytest.mark.parametrize(("code", "wanted"), [(3, 3), (75, 75), (5, 5), (-9, 1)])
def test_a_ranks_exit_code_is_the_commands(start: Start, code: int, wanted: int) -> None:
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=code, error_file="none")
    start(ChildFailedError("recemb", {1: failure}))
    assert main(["train", "--nproc_per_node", "2", *FLAGS]) == wanted


def test_a_signal_is_told_as_one(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    start(SignalException("stopped", signal.SIGTERM))
    assert main(["train", "--nproc_per_node", "2", *FLAGS]) == 75
    assert "SIGTERM came, and all ranks have stopped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nproc_per_node", "0"], "'0' is no whole number from 1 on"),
        (["--nproc_per_node", "two"], "'two' is no whole number"),
        (["--max_restarts", "3"], "--max_restarts needs --nproc_per_node"),
        (["--nproc_per_node", "2", "--batch_size", "x"], "batch_size"),
    ],
)
def test_what_is_refused_before_any_rank_starts(
    start: Start, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    asked = start(None)
    assert main(["train", *words, *FLAGS]) == 2
    assert message in capsys.readouterr().err
    assert not asked


def test_a_rank_starts_no_ranks(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = start(None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--nproc_per_node", "2", *FLAGS]) == 2
    assert not asked


def test_switches() -> None:
    flags = {"config": None, "seed": "3", "resume": True, "shuffle_batches": False}
    assert words_of("train", flags) == ["train", "--seed", "3", "--resume", "--no-shuffle_batches"]
