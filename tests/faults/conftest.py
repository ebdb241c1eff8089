"""Ranks on this machine, with faults built in."""

from __future__ import annotations

import json
import os
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
            text=True,
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
        **flags: Any,
    ) -> Ended:
        """Run the command on ``size`` ranks until all of them have ended.

        Args:
            output: the run directory.
            size: number of ranks.
            hooks: rank -> its fault, for :func:`tests.faults.hooks.install`.
            each: rank -> flags of this rank alone.
            after: called with the process ids once they have started.
        """
        self._count += 1
        log, port = self._scratch / f"log-{self._count}-", free_port()
        ranks = [
            {
                "argv": self.arguments(output, **flags | (each or {}).get(rank, {})),
                "env": rank_environment(rank, size, port),
                "hook": (hooks or {}).get(rank, {}),
            }
            for rank in range(size)
        ]
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"log": str(log), "ranks": ranks}) + "\n")
        self._process.stdin.flush()
        pids = json.loads(self._read())["pids"]
        if after is not None:
            after(pids)
        found = json.loads(self._read(pids))
        logs = [Path(f"{log}{rank}").read_text() for rank in range(size)]
        return Ended(found["codes"], found["ended"], logs)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)

    def _read(self, pids: Sequence[int] = ()) -> str:
        import select

        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        for pid in [] if ready else pids:
            os.kill(pid, signal.SIGKILL)
        assert ready, "the ranks hang"
        return self._process.stdout.readline().strip()


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


def wait_for(path: Path) -> float:
    """The time in a mark that a rank leaves."""
    deadline = time.monotonic() + PATIENCE
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} was never written"
        time.sleep(0.02)
    return float(path.read_text())
