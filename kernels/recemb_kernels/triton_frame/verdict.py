"""Errors that only the device can see, raised on the host once they have arrived there.

A kernel leaves a mark; the mark travels to the host beside the work that follows, and is read when it has
come, at the next look-up or step. Nothing waits, and what the mark forbids has not been done on the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor

from recemb_kernels.triton_frame.captures import capturing

_Pending = tuple[Any, Tensor, Callable[[], Exception]]
_pending: deque[_Pending] = deque()
_lock = Lock()  # of looking at the first one and taking it away


def note(mark: Tensor, error: Callable[[], Exception]) -> None:
    """Raise ``error()`` now or at a later :func:`poll` if ``mark`` [1] is not 0.

    Args:
        mark: on the CPU it is looked at now.
        error: makes the error, on the host, where it may wait for the device.
    """
    if mark.is_cpu:
        if bool(mark):
            raise error()
        return
    if capturing():
        return  # A graph is replayed without the host: its marks can only forbid.
    # Whatever the default device is: no other memory can be pinned.
    host = torch.empty(mark.shape, dtype=mark.dtype, device="cpu", pin_memory=True)
    host.copy_(mark, non_blocking=True)
    arrived = cast(Any, torch.cuda).Event()  # untyped
    arrived.record(torch.cuda.current_stream(mark.device))
    _pending.append((arrived, host, error))


def poll(wait: bool = False) -> None:
    """Raise the first error whose mark has arrived.

    Args:
        wait: for those under way too, as a collection's ``state_dict`` does.
    """
    if _pending and capturing():
        return  # Asking an event would end the capture.
    while True:
        with _lock:
            if not _pending:
                return
            arrived, host, error = _pending[0]
            if not wait and not arrived.query():
                return
            _pending.popleft()
        if wait:
            arrived.synchronize()
        if bool(host):
            raise error()
