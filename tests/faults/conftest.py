"""Ranks on this machine, with faults built in."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recemb.data.synthetic import write_synthetic

ROOT = Path(__file__).resolve().parents[2]
# Seconds; a loaded machine is slow, and a hang is none of these tests' results.
PATIENCE = 90
# 3,200 training rows: 16 steps an epoch for 2 ranks, and 11 and a half empty one at 150 rows each.
SMALL = {
    "embedding_dim": "4",
    "dense_arch_layer_sizes": "8,4",
    "over_arch_layer_sizes": "8,1",
    "method": "tt",
    "compress_rate": "5",
    "batch_size": "100",
    "validation_freq_within_epoch": "5",
    "dist_timeout_seconds": "30",
}


# Steps 0 to 15, the second epoch from step 8, with checkpoints after 3, 6, 9, 12, 15 and 16.
RUN: dict[str, Any] = {"epochs": 2, "limit_train_batches": 8, "checkpoint_freq": 3}


@dataclass(frozen=True)
class Ended:
    """What became of the ranks of one command."""

    codes: list[int]
    ended: list[float]
    logs: list[str]


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    if size == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class Launcher:
    """Starts ``recemb train`` as one rank or several."""

    def __init__(self, data_dir: Path, scratch: Path) -> None:
        self._data_dir, self._scratch, self._count = data_dir, scratch, 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Unbuffered: what has been read of the pipe is not there for `select` any more.
            bufsize=0,
            cwd=ROOT,
            env=environment(),
        )
        assert self._read() == "ready"

    def arguments(self, output: Path, **flags: Any) -> list[str]:
        """A command line; a flag that is ``True`` is a switch, one that is ``None`` is left out."""
        words = ["train", "--data_dir", str(self._data_dir), "--output", str(output)]
        for name, value in (SMALL | flags).items():
            if value is not None:
                words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return words

    def train(
        self,
        output: Path,
        size: int = 2,
        hooks: dict[int, dict[str, Any]] | None = None,
        each: dict[int, dict[str, Any]] | None = None,
        after: Callable[[list[int]], None] | None = None,
        port: int | None = None,
        alone: bool = False,
        restarts: int = 0,
        **flags: Any,
    ) -> Ended:
        """Run the command on ``size`` ranks until all of them have ended.

        Args:
            output: the run directory.
            size: number of ranks.
            hooks: rank -> its fault, for :func:`tests.faults.hooks.install`.
            each: rank -> flags of this rank alone.
            after: called with the process ids once they have started.
            port: where the ranks meet; a free one when left out.
            alone: whether only rank 0 is started.
            restarts: how often torchrun says that it has restarted the ranks.
        """
        self._count += 1
        log = self._scratch / f"log-{self._count}-"
        port = free_port() if port is None else port
        ranks = [
            {
                "argv": self.arguments(output, **flags | (each or {}).get(rank, {})),
                "env": rank_environment(rank, size, port) | {"TORCHELASTIC_RESTART_COUNT": str(restarts)},
                "hook": (hooks or {}).get(rank, {}),
            }
            for rank in range(1 if alone else size)
        ]
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"log": str(log), "ranks": ranks}).encode() + b"\n")
        pids = json.loads(self._read())["pids"]
        if after is not None:
            after(pids)
        found = json.loads(self._read(pids))
        logs = [Path(f"{log}{rank}").read_text() for rank in range(len(pids))]
        return Ended(found["codes"], found["ended"], logs)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _read(self, pids: Sequence[int] = ()) -> str:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        for pid in [] if ready else pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert ready, "the ranks hang"
        return self._process.stdout.readline().decode().strip()


@pytest.fixture(scope="session")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3,200 training, 400 validation and 400 test rows."""
    path = tmp_path_factory.mktemp("log") / "synthetic"
    write_synthetic(path, 4000, "1/2000", seed=3, val_fraction="0.1", test_fraction="0.1")
    return path


@pytest.fixture(scope="session")
def launcher(log_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    made = Launcher(log_dir, tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def unbroken(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing has happened to."""
    output = tmp_path_factory.mktemp("unbroken") / "run"
    ended = launcher.train(output, **RUN)
    assert ended.codes == [0, 0], ended.logs
    return output


def wait_for(path: Path) -> float:
    """The time in a mark that a rank leaves."""
    deadline = time.monotonic() + PATIENCE
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} was never written"
        time.sleep(0.02)
    return float(path.read_text())


def wait_until_gone(pid: int) -> None:
    """Until no process has this id."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)


def weights(output: Path) -> dict[str, torch.Tensor]:
    """The best weights of a run."""
    return load_file(output / "checkpoints" / "model.safetensors")


def result(output: Path) -> dict[str, Any]:
    found = json.loads((output / "result.json").read_text())
    assert isinstance(found, dict)
    return found


def evaluations(output: Path) -> list[dict[str, Any]]:
    """The lines of the metrics, without the clock."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "evaluation_seconds"} for line in lines]


def assert_same_run(output: Path, other: Path) -> None:
    """Weights, figures and evaluations, bit for bit."""
    mine, theirs = weights(output), weights(other)
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different
    assert evaluations(output) == evaluations(other)
    figures = ("auc", "logloss", "ne", "calibration", "best_step", "steps", "epochs", "train_samples", "val")
    one, two = result(output), result(other)
    assert {name: one[name] for name in figures} == {name: two[name] for name in figures}


def distance(output: Path, other: Path) -> float:
    """The largest difference of a weight."""
    mine, theirs = weights(output), weights(other)
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)
