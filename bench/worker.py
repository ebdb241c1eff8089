"""A child process that times one case at a time on demand: JSON lines in, JSON lines out.

Two commits, or a table of a billion rows, are measured in processes of their own; the parent decides whose
turn it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import Seconds
from bench.settings import Setting
from recemb.errors import RecembError

# Each thread keeps to a core, and the first one to the same core in every worker. Left to the system, the
# main threads of two workers lie on different cores, and small steps took up to twice as long on one of them.
_ON_ONE_CORE = {"OMP_PROC_BIND": "close", "OMP_PLACES": "threads"}


class WorkerError(RecembError):
    """A worker that could not do what it was asked; the message is its own (exit code 1)."""


class Worker:
    """The parent's end.

    Args:
        package_root: the checkout whose recemb and kernels the child imports; the benchmark code is always
            this checkout's.
    """

    def __init__(self, package_root: Path) -> None:
        bench_root = Path(__file__).resolve().parents[1]
        # -m puts the working directory first: recemb is package_root's, bench comes from the last entry.
        path = os.pathsep.join([str(package_root / "kernels"), str(bench_root)])
        peers = os.environ.get("PYTHONPATH")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker"],
            cwd=package_root,
            env=_ON_ONE_CORE
            | os.environ
            | {"PYTHONPATH": os.pathsep.join([path, peers] if peers else [path])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        found = Path(self._ask(do="where")["recemb"]).parents[1]
        if found != package_root.resolve():
            raise WorkerError(f"the child imports recemb from {found}, not from {package_root}")

    @property
    def pid(self) -> int:
        """The child's process."""
        return self._process.pid

    def build(self, key: str, setting: Setting, case: str, paths: Sequence[str]) -> None:
        """Build a case and warm up its paths; the turns of a path are asked for as ``key path``."""
        self._ask(do="build", key=key, setting=vars(setting), case=case, paths=paths)

    def turn(self, key: str, turn: int) -> float:
        """Seconds of one step."""
        return float(self._ask(do="turn", key=key, turn=turn)["seconds"])

    def hand_over(self) -> float | None:
        """:func:`bench.hand_over.hand_over` of the child's threads; the parent's would spin beside a step."""
        found = self._ask(do="hand_over")["ns"]
        return None if found is None else float(found)

    def drop(self) -> None:
        """Forget every case."""
        self._ask(do="drop")

    def peak_bytes(self) -> int:
        """Peak resident memory above what the imports took."""
        return int(self._ask(do="peak")["bytes"])

    def close(self) -> None:
        """End the child."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, **message: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(
                f"the measuring process ended with exit code {self._process.wait()}; its own words are above"
            )
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply


def alternate(workers: Sequence[Worker], keys: Sequence[str], rounds: int) -> dict[str, list[Seconds]]:
    """Seconds of every key in every worker, a step each a round; workers change who goes first.

    All keys take part in every round, so that each is spread over the whole run: a disturbance of a second
    must not meet one case alone.
    """
    times = {key: [np.empty(rounds) for _ in workers] for key in keys}
    for turn in range(rounds):
        order = range(len(workers)) if turn % 2 else range(len(workers) - 1, -1, -1)
        for key in keys:
            for k in order:
                times[key][k][turn] = workers[k].turn(key, turn)
    return times


class _Server:
    def __init__(self) -> None:
        import bench.session  # noqa: F401 # everything heavy, before the baseline is taken
        from recemb.training.environment import peak_rss_bytes, reset_peak_rss

        reset_peak_rss()
        self._peak = peak_rss_bytes
        self._baseline = peak_rss_bytes()
        self._runners: dict[str, Any] = {}

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        match message["do"]:
            case "where":
                import recemb

                return {"recemb": str(Path(str(recemb.__file__)).resolve())}
            case "build":
                self._build(**{name: value for name, value in message.items() if name != "do"})
            case "turn":
                runner, turn = self._runners[message["key"]], message["turn"]
                # The step before wakes what slept while others had their turns; its batch comes up last.
                runner.run(turn + len(runner.batches) // 2)
                return {"seconds": runner.run(turn)}
            case "hand_over":
                from bench.hand_over import hand_over

                return {"ns": hand_over()}
            case "drop":
                self._runners.clear()
            case "peak":
                return {"bytes": self._peak() - self._baseline}
        return {}

    def _build(self, key: str, setting: dict[str, Any], case: str, paths: Sequence[str]) -> None:
        from bench.ids import make_batches
        from bench.ours import OurTables
        from bench.session import make_runners

        sizes = Setting(**{**setting, "rows": tuple(setting["rows"])})
        tables = OurTables(case, sizes.rows, sizes.dim, sizes.optimizer)
        for (_, path), runner in make_runners({case: tables}, paths, make_batches(sizes)).items():
            runner.warm_up()
            self._runners[f"{key} {path}"] = runner


def serve(lines: Iterable[str]) -> None:
    """Answer until the parent closes the pipe."""
    # Replies have the real stdout to themselves: whatever a library prints goes to stderr.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = _Server()
    for line in lines:
        try:
            reply = server.answer(json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    serve(sys.stdin)
