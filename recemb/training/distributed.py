"""The ranks of a run: who they are, what they agree on before and during it, and how they part.

Nothing that one rank alone finds out ends the run on that rank alone: errors, stop requests and the choice of
a checkpoint are exchanged, so that all ranks stop at the same place with the same exit code. What cannot be
exchanged, because a rank is gone or stuck, comes through :mod:`recemb.training.peers`.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from recemb.checkpoint.ranks import Ranks, described, remade
from recemb.errors import ConfigError, RankLost, RecembError
from recemb.training.interrupt import not_terminated
from recemb.training.peers import GRACE_SECONDS, Loss, PeerLink

if TYPE_CHECKING:
    from recemb.training.config import RunConfig

_Value = TypeVar("_Value")
_NEEDED: Final = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_RESTARTS: Final = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
_COMMAND: Final = "torchrun --standalone --nproc_per_node=2 -m recemb train ..."
# Status of a rank in an agreement: nothing, a failure that may be another rank's, one of its own, or a
# signal's number above these.
_FINE, _AFFECTED, _FAILED, _SIGNAL = 0, 1, 2, 3


@dataclass(frozen=True)
class Launch:
    """What torchrun says about this process; the defaults are those of a process without it."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Launch:
        """Read torchrun's variables.

        Raises:
            ConfigError: some are missing or no numbers, or restarts are asked for that would hang.
        """
        size = _number(environment, "WORLD_SIZE", 1)
        if size == 1:
            return cls()
        missing = [name for name in _NEEDED if not environment.get(name)]
        if missing:
            raise ConfigError(
                f"WORLD_SIZE={size} is set and {', '.join(missing)} not; start the ranks with `{_COMMAND}`, "
                "or unset WORLD_SIZE to train in one process"
            )
        if _number(environment, "TORCHELASTIC_MAX_RESTARTS", 0) > 0 and environment.get(_RESTARTS) != "1":
            raise ConfigError(
                f"torchrun --max-restarts needs {_RESTARTS}=1 in its own environment: without it, restarted "
                f"ranks find the addresses of dead ones and fail or hang; give `{_RESTARTS}=1 {_COMMAND}`"
            )
        rank, local = _number(environment, "RANK", 0), _number(environment, "LOCAL_RANK", 0)
        local_size = _number(environment, "LOCAL_WORLD_SIZE", 1)
        if not 0 <= rank < size or local < 0:
            raise ConfigError(f"RANK={rank}, LOCAL_RANK={local}: must be in [0, WORLD_SIZE={size})")
        return cls(rank, size, local, local_size)


class World:
    """The ranks that train together; without arguments, one process alone.

    Args:
        launch: who this process is.
        group: moves small host tensors between the ranks.
        link: tells of lost ranks.

    Attributes:
        together: set once all ranks are about to end, with the same error: none of them is then in a
            collective, and they wait for each other before they leave.
    """

    def __init__(
        self,
        launch: Launch = Launch(),
        group: dist.ProcessGroup | None = None,
        link: PeerLink | None = None,
    ) -> None:
        self.rank, self.size = launch.rank, launch.size
        self.local_size = launch.local_size
        self.together = False
        self._group, self._link = group, link

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and reports."""
        return self.rank == 0

    def note(self, doing: object) -> None:
        """What this rank does now, for the message should it be the one that others wait for."""
        if self._link is not None:
            self._link.doing = doing

    def agree(
        self, error: RecembError | None = None, stop: str | None = None, *, own: bool = True
    ) -> str | None:
        """Exchange what has happened on each rank since the last agreement.

        Args:
            error: why this rank cannot go on.
            stop: the signal that asked it to stop.
            own: whether ``error`` arose on this rank; else another's that did is preferred.

        Returns:
            the signal that any rank got.

        Raises:
            RecembError: of the first rank that has one, on every rank, naming it.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return stop
        status = torch.zeros(self.size, dtype=torch.int64)
        status[self.rank] = _FINE if stop is None else _SIGNAL + signal.Signals[stop].value
        if error is not None:
            status[self.rank] = _FAILED if own else _AFFECTED
        assert self._link is not None
        self._link.waiting = True
        dist.all_reduce(status, dist.ReduceOp.MAX, group=self._group)
        self._link.waiting = False
        found = status.tolist()
        if _FAILED in found or _AFFECTED in found:
            self.together = True
            rank = found.index(_FAILED if _FAILED in found else _AFFECTED)
            told = self.exchange({} if error is None else described(error))
            raise remade(rank, **told[rank]) from error
        signals = [each - _SIGNAL for each in found if each >= _SIGNAL]
        return signal.Signals(signals[0]).name if signals else None

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """What fails inside on one rank fails on all of them, at the end of the block."""
        error = None
        try:
            yield
        except RecembError as problem:
            error = problem
        self.agree(error)

    def first(self, work: Callable[[], None]) -> None:
        """Do ``work`` on rank 0 alone; its failure is everyone's."""
        with self.agreeing():
            if self.is_first:
                work()

    @contextmanager
    def together_raising(self) -> Iterator[None]:
        """What fails inside fails on every rank, with the same error: the ranks agree on it in there."""
        try:
            yield
        except RecembError:
            self.together = True
            raise

    def exchange(self, value: _Value) -> list[_Value]:
        """Every rank's ``value``, in the order of ranks; small, and JSON."""
        return Ranks(self._group).exchange(value) if self.size > 1 else [value]

    def sum(self, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The sum of every rank's array."""
        if self.size == 1:
            return counts
        total = torch.from_numpy(counts.copy())
        dist.all_reduce(total, group=self._group)
        return total.numpy()

    def check_equal(self, what: str, facts: Mapping[str, object]) -> None:
        """Refuse ranks that were started differently, before a collective of other sizes kills them all.

        Args:
            what: of what the facts are, for the message.
            facts: name -> value, which must be equal on every rank.

        Raises:
            ConfigError: naming each fact that differs, and the values, on every rank.
        """
        texts = {name: str(value) for name, value in facts.items()}
        every = self.exchange(texts)
        problems = []
        for name in sorted({name for each in every for name in each}):
            values = [each.get(name) for each in every]
            other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
            if other is not None:
                problems.append(
                    f"{name}: rank 0 has {_short(values[0])} and rank {other} has {_short(values[other])}"
                )
        if problems:
            self.together = True
            raise ConfigError("\n  ".join([f"the ranks differ in their {what}:", *problems]))

    def _part(self, error: BaseException | None) -> None:
        """Leave the others: after all of them where they are in step, at once where this rank alone ends."""
        if self._link is None:
            return
        if error is None or self.together:
            # Who is lost by now is told by the link.
            with suppress(RuntimeError):
                dist.barrier(group=self._group)
                # They all know why: one that ends a little later must not take this one for lost.
                self._link.leave(0, "in step")
                return
            # Some did not come, so they are not in step: what ended this rank may be news to the others.
            self.together = False
        if isinstance(error, RecembError):
            self._link.leave(error.exit_code, str(error))
        else:
            self._link.leave(0 if error is None else 1, f"{type(error).__name__}: {error}")

    def _end(self) -> None:
        """End the process group, and its threads, which run until nothing refers to it."""
        self._group = None
        dist.destroy_process_group()
        # Sharded modules are in cycles.
        gc.collect()

    def _lost(self, error: RuntimeError) -> Loss | None:
        """What a failed collective is due to; ``None`` when ``error`` is a defect of this program's."""
        assert self._link is not None
        loss = self._link.loss(wait_seconds=1.0)
        if loss is None and _of_a_collective(error):
            missing, reason = self._link.who_is_missing(), str(error).partition("\n")[0]
            loss = Loss(self.rank, 1, f"a collective failed or timed out and {missing} ({_short(reason)})")
            self._link.end_process_within(2 * GRACE_SECONDS, loss.exit_code, loss.message)
        return loss


@contextmanager
def joined(config: RunConfig) -> Iterator[World]:
    """Meet the other ranks that torchrun started, and part from them at the end, however it comes.

    Raises:
        ConfigError: the ranks cannot meet.
        RankLost: one of them was lost; raised on all that are left, within seconds.
    """
    launch = Launch.of(os.environ)
    if launch.size == 1:
        yield World()
        return
    world = _join(launch, config.device, config.dist_timeout_seconds)
    try:
        yield world
        world._part(None)
    except RecembError as error:
        world._part(error)
        if world.together:
            # Of ranks that are not in step its end could wait for others.
            with suppress(RuntimeError):
                world._end()
        raise
    except RuntimeError as error:
        # The link ends the process soon after a loss, and torchrun would end it before it has told of it.
        with not_terminated():
            loss = world._lost(error)
            message = f"{type(error).__name__}: {error}" if loss is None else loss.message
            assert world._link is not None
            world._link.leave(1 if loss is None else loss.exit_code, message)
            if loss is not None:
                raise RankLost(
                    f"rank {world.rank}, {world._link.where}: {message}. Give the same command with --resume "
                    "to go on from the last checkpoint",
                    loss.exit_code,
                ) from error
        raise
    except BaseException as error:
        world._part(error)
        raise
    world._end()


def _join(launch: Launch, device: str, timeout_seconds: int) -> World:
    timeout = timedelta(seconds=timeout_seconds)
    if device == "cuda":
        if launch.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {launch.rank} is number {launch.local_rank} on its machine, which has "
                f"{torch.cuda.device_count()} CUDA devices; start one rank a device, or use --device cpu"
            )
        torch.cuda.set_device(launch.local_rank)
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        store, _, _ = next(rendezvous("env://", launch.rank, launch.size, timeout=timeout))
        one_machine = launch.size == launch.local_size
        link = PeerLink(launch.rank, launch.size, store, host, timeout_seconds, one_machine=one_machine)
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=PrefixStore("recemb/group", store),
            rank=launch.rank,
            world_size=launch.size,
            timeout=timeout,
        )
        group = dist.new_group(backend="gloo", timeout=timeout) if device == "cuda" else dist.group.WORLD
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"rank {launch.rank} cannot meet the other ranks at MASTER_ADDR={host} MASTER_PORT={port}: "
            f"{error}; give torchrun a free port (--standalone on one machine, --rdzv_endpoint=HOST:PORT "
            "on several)"
        ) from error
    return World(launch, group, link)


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r} is no number; start the ranks with `{_COMMAND}`") from None


def _of_a_collective(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "nccl", "timed out", "connection", "broken pipe")
    )


def _short(value: str | None, limit: int = 200) -> str:
    text = "nothing" if value is None else value
    return text if len(text) <= limit else f"{text[:limit]}..."
