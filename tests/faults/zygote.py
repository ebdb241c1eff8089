"""A process that has imported everything once and forks into ranks: a rank of its own would cost 5 seconds.

Reads one request a line, ``{"log": path, "ranks": [{"argv": [...], "env": {...}, "hook": {...}}]}``, and
answers with ``{"pids": [...]}`` and, once all have ended, ``{"codes": [...], "ended": [...]}``, where
``ended`` are times of ``time.monotonic``.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import recemb.cli.main
import recemb.training.run
from tests.faults import hooks


def native_threads() -> list[str]:
    """Names of this process's threads that serve torch's collectives, where the system tells."""
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended by now
            names.append(path.read_text().strip())
    return sorted(name for name in names if name.startswith(("gloo", "pt_")))


def rank(order: dict[str, Any], log: str) -> int:
    """What a child does: one ``recemb`` command with a fault built in."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(order["env"])
    try:
        hooks.install(**order["hook"])
        code = recemb.cli.main.main(order["argv"])
        print(f"threads at the end: {native_threads()}")
        return code
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run(request: dict[str, Any]) -> None:
    pids = []
    for number, order in enumerate(request["ranks"]):
        pid = os.fork()
        if pid == 0:
            os._exit(rank(order, f"{request['log']}{number}"))
        pids.append(pid)
    print(json.dumps({"pids": pids}), flush=True)
    codes, ended = [0] * len(pids), [0.0] * len(pids)
    for _ in pids:
        pid, status = os.wait()
        at = pids.index(pid)
        codes[at], ended[at] = os.waitstatus_to_exitcode(status), time.monotonic()
    print(json.dumps({"codes": codes, "ended": ended}), flush=True)


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        run(json.loads(line))
