"""Streams of recemb's own, and work that one CUDA stream hands to another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, is_dataclass
from threading import Lock
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_T = TypeVar("_T")
_own: dict[tuple[str, torch.device], torch.cuda.Stream] = {}
_drawn: set[int] = set()  # all that are recemb's
_lock = Lock()  # of the above
_free: dict[torch.device, list[torch.cuda.Stream]] = {}  # to be lent
_lent: Counter[torch.device] = Counter()  # how many there are of these, lent or free
# Streams that torch has of a device, handed out in turns, and how many of these may be lent: a caller's own
# ones, pipelines' and data loaders' are drawn from the same.
_TORCHS, _MOST_LENT = 32, 16


class NoStreamError(RuntimeError):
    """As many streams are lent as may be."""


def own_stream(use: str, device: torch.device) -> torch.cuda.Stream:
    """The stream for one use on a device, the same one each time.

    Who draws many comes to share them with pipelines and data loaders, whose launches a capture would record
    in place of running them.

    Args:
        use: what for.
        device: where.
    """
    key = use, device
    with _lock:
        if key not in _own:
            _own[key] = _draw(device)
        return _own[key]


class LentStream:
    """A stream that recemb has for nothing else as long as this lives; then it is lent again.

    Args:
        device: where.

    Attributes:
        stream: what is lent.
        spent: whether something may stay behind that no one must meet: it is not lent again.

    Raises:
        NoStreamError: as many are lent as may be.
    """

    def __init__(self, device: torch.device) -> None:
        self._free = _free.setdefault(device, [])
        self.spent = False
        # Without the lock: Python may let go of another one, and give its stream back, at any point of this.
        try:
            self.stream = self._free.pop()
        except IndexError:
            self.stream = _draw_to_lend(device)

    def __del__(self) -> None:
        if not self.spent and hasattr(self, "stream"):
            self._free.append(self.stream)


def _draw(device: torch.device) -> torch.cuda.Stream:
    """One that recemb does not have yet, where there is one."""
    for _ in range(_TORCHS):
        found: torch.cuda.Stream = cast(Any, torch.cuda).Stream(device)  # untyped
        if found.cuda_stream not in _drawn:
            break
    _drawn.add(found.cuda_stream)
    return found


def _draw_to_lend(device: torch.device) -> torch.cuda.Stream:
    with _lock:
        if _lent[device] == _MOST_LENT:
            raise NoStreamError(f"CUDA graphs have {_MOST_LENT} streams already, half of torch's")
        found = _draw(device)
        _lent[device] += 1
        return found


@dataclass(frozen=True, eq=False)
class HandOver:
    """What a stream has been given to do so far, for another one to wait for.

    Attributes:
        stream: the one that works.
        done: when it has.
    """

    stream: torch.cuda.Stream
    done: torch.cuda.Event

    @classmethod
    def now(cls, device: torch.device) -> HandOver | None:
        """What the device's current stream has been given by now; ``None`` where there are no streams."""
        if device.type != "cuda":
            return None
        stream = torch.cuda.current_stream(device)
        done = cast(Any, torch.cuda).Event()  # untyped
        done.record(stream)
        return cls(stream, done)

    def take(self, held: Any) -> None:
        """Have the current stream wait, and keep the memory of what it reads until it has read it.

        Args:
            held: tensors, in dataclasses, lists or dictionaries, whose memory is the other stream's.
        """
        own = torch.cuda.current_stream(self.stream.device)
        if own == self.stream:
            return
        own.wait_event(self.done)
        for tensor in tensors_of(held):
            tensor.record_stream(own)


def tensors_of(held: Any) -> Iterator[Tensor]:
    """Every tensor within dataclasses, lists and dictionaries."""
    if isinstance(held, Tensor):
        yield held
    elif is_dataclass(held):
        # Those with slots refer to no tensors of a batch.
        yield from tensors_of(getattr(held, "__dict__", {}))
    elif isinstance(held, Mapping):
        yield from tensors_of(list(held.values()))
    elif isinstance(held, list | tuple):
        for item in held:
            yield from tensors_of(item)


def copied(held: _T) -> _T:
    """The same dataclasses, lists and dictionaries, with tensors of their own memory."""
    made: Any = held
    if isinstance(held, Tensor):
        made = held.clone()
    elif is_dataclass(held) and hasattr(held, "__dict__"):
        made = copy(held)
        vars(made).update({name: copied(value) for name, value in vars(held).items()})
    elif isinstance(held, Mapping):
        made = {key: copied(value) for key, value in held.items()}
    elif isinstance(held, list | tuple):
        made = type(held)(copied(item) for item in held)
    return cast(_T, made)
