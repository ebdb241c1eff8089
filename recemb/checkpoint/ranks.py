"""What the ranks of a job tell each other around a checkpoint: JSON, never pickle."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from recemb.errors import CheckpointError, DiskFullError

_Result = TypeVar("_Result")


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
            CheckpointError: another rank failed; its message says which.
            Exception: what ``work`` raised here.
        """
        if self.size == 1:
            return [work()]
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        told = self.exchange({"result": result, "failure": _describe(failure)})
        if failure is not None:
            raise failure
        for rank, outcome in enumerate(told):
            if outcome["failure"] is not None:
                raise _failure_of(rank, **outcome["failure"])
        return [outcome["result"] for outcome in told]


def _device(group: dist.ProcessGroup | None) -> torch.device:
    # NCCL moves CUDA tensors only; a group that can also move host memory is asked to.
    backend = str(dist.get_backend(group))
    if "gloo" in backend or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _describe(failure: Exception | None) -> dict[str, Any] | None:
    if failure is None:
        return None
    text = str(failure) if isinstance(failure, CheckpointError) else f"{type(failure).__name__}: {failure}"
    disk = [failure.needed, failure.free] if isinstance(failure, DiskFullError) else None
    return {"text": text, "disk": disk}


def _failure_of(rank: int, text: str, disk: list[int] | None) -> CheckpointError:
    message = f"rank {rank}: {text}"
    return CheckpointError(message) if disk is None else DiskFullError(message, disk[0], disk[1])
