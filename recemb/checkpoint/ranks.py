"""What the ranks of a job tell each other around a checkpoint: JSON, never pickle."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist

from recemb import errors
from recemb.errors import CheckpointError, DiskFullError, RankLost, RecembError

_Result = TypeVar("_Result")
_PLAIN_ERRORS: Final = (
    "ConfigError",
    "BatchError",
    "DataError",
    "PlanError",
    "CheckpointError",
    "NonFiniteError",
)

log = logging.getLogger(__name__)


class Ranks:
    """The ranks that save or load together; one where nothing is distributed.

    Args:
        group: ``None`` for the default group, if there is one of more than one rank.

    Attributes:
        rank: of this process.
        size: how many there are.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        alone = group is None and not (dist.is_available() and dist.is_initialized())
        self.rank = 0 if alone else dist.get_rank(group)
        self.size = 1 if alone else dist.get_world_size(group)
        if self.rank < 0:
            raise CheckpointError("this process is not in the group that saves or loads; call it on members")

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in the order of ranks. No rank returns before all have called it.

        Args:
            value: JSON.
        """
        if self.size == 1:
            return [value]
        device = _device(self._group)
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([text.numel()], device=device), group=self._group)
        longest = max(int(size) for size in sizes)
        # all_gather wants equal sizes.
        padded = torch.zeros(longest, dtype=torch.uint8, device=device)
        padded[: text.numel()] = text
        texts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(texts, padded, group=self._group)
        return [
            json.loads(each[: int(size)].cpu().numpy().tobytes())
            for each, size in zip(texts, sizes, strict=True)
        ]

    def together(self, work: Callable[[], _Result]) -> list[_Result]:
        """Every rank's result of ``work``, which is JSON. When it fails on one rank it fails on all of them.

        Raises:
            RecembError: of the first rank that failed, on every rank; on the others its message names it. A
                full disk, after which training goes on, only where nothing else failed. A defect is logged
                where it is, and :class:`RankLost` on every rank.
        """
        if self.size == 1:
            return [work()]
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
            if not isinstance(error, RecembError):
                log.exception("rank %d cannot go on:", self.rank)
        told = self.exchange({"result": result, "failure": None if failure is None else described(failure)})
        failures = [(rank, each["failure"]) for rank, each in enumerate(told) if each["failure"] is not None]
        if failures:
            rank, chosen = min(failures, key=lambda item: item[1]["disk"] is not None)
            if rank == self.rank and isinstance(failure, RecembError):
                raise failure
            raise remade(rank, **chosen) from failure
        return [outcome["result"] for outcome in told]


def described(failure: Exception) -> dict[str, Any]:
    """An error as JSON, for :func:`remade` on other ranks."""
    kind = type(failure).__name__
    text, exit_code = f"{kind}: {failure}", 1
    if isinstance(failure, RecembError):
        text, exit_code = str(failure), failure.exit_code
    return {
        "kind": kind,
        "text": text,
        "exit_code": exit_code,
        "disk": [failure.needed, failure.free] if isinstance(failure, DiskFullError) else None,
    }


def remade(rank: int, kind: str, text: str, exit_code: int, disk: list[int] | None) -> RecembError:
    """``rank``'s error as every rank raises it: of the same class, but for those that are no user's."""
    message = f"rank {rank}: {text}"
    if disk is not None:
        return DiskFullError(message, disk[0], disk[1])
    if kind in _PLAIN_ERRORS:
        made: RecembError = getattr(errors, kind)(message)
        return made
    return RankLost(message, exit_code)


def _device(group: dist.ProcessGroup | None) -> torch.device:
    # NCCL moves CUDA tensors only; a group that can also move host memory is asked to.
    backend = str(dist.get_backend(group))
    if "gloo" in backend or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
