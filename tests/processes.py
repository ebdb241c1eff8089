"""Ranks of a test as processes of their own, on gloo over the loopback; and forks of the test itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Ended:
    """How the ranks ended, and what they said."""

    codes: list[int]
    said: list[str]


def run_ranks(module: str, world: int, arguments: Sequence[object], folder: Path, seconds: float) -> Ended:
    """Run ``python -m module rank *arguments`` for every rank, one thread each, with logs in ``folder``.

    Raises:
        subprocess.TimeoutExpired: one has not ended in ``seconds``; all are killed.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        # Hosts of two ranks.
        "LOCAL_WORLD_SIZE": "2",
    }
    files = [folder / f"log{rank}" for rank in range(world)]
    logs = [file.open("w") for file in files]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), *map(str, arguments)],
            env=environment,
            cwd=ROOT,
            stdout=log,
            stderr=log,
        )
        for rank, log in enumerate(logs)
    ]
    deadline = time.monotonic() + seconds
    try:
        for process in ranks:
            process.wait(timeout=max(1, deadline - time.monotonic()))
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
    return Ended([process.returncode for process in ranks], [file.read_text() for file in files])


def fork(work: Callable[[], None]) -> int:
    """The process number of a fork that does ``work`` and ends with 0, or with 1 when it fails."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def status_of(pid: int) -> int:
    """How a fork ended: its exit code, or minus the signal that killed it."""
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)
