"""``recemb train --nproc_per_node N``: torchrun on this machine, with what it needs to restart ranks."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping

from recemb.errors import ConfigError, Interrupted

# Restarted ranks must not find the addresses of dead ones (pytorch #135712). Read by torchrun's own process.
_OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def launch(ranks: int, max_restarts: int, words: list[str]) -> int:
    """Run ``recemb`` with ``words`` on ``ranks`` processes of this machine, and wait for all of them.

    Args:
        ranks: how many.
        max_restarts: how often all of them are started again after one has failed.
        words: a verb and its flags.

    Returns:
        0, or the exit code of the first rank that failed in the last attempt; 1 when it was killed.

    Raises:
        Interrupted: a signal came, and was passed on to the ranks.
        ConfigError: this is a rank already.
    """
    if os.environ.get("WORLD_SIZE"):
        raise ConfigError("--nproc_per_node: torchrun has started this process as a rank; remove the flag")
    os.environ[_OWN_STORE] = "1"
    # Each rank would otherwise start a thread for every core of the machine.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=os.urandom(8).hex(),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "recemb", *words)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 1
    except SignalException as error:
        name = signal.Signals(error.sigval).name
        raise Interrupted(f"{name} came, and all ranks have stopped; what they have said is above") from None
    return 0


def words_of(verb: str, flags: Mapping[str, str | bool | None]) -> list[str]:
    """The command line that argparse reads as ``flags``: text, switches, and ``--no-`` switches."""
    words = [verb]
    for name, value in flags.items():
        if isinstance(value, str):
            words += [f"--{name}", value]
        elif value is not None:
            words.append(f"--{name}" if value else f"--no-{name}")
    return words
