"""SIGINT and SIGTERM ask a run to stop after the step it is in; a second signal stops it at once.

A rank that ends since another was lost says so first, though torchrun terminates it as soon as that is gone.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, remembers a signal instead of dying from it.

    ``requested`` is the name of the signal that came, or ``None``.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python delivers signals to the main thread only; elsewhere the caller keeps its own handling.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        self._restore()
        # Not print: the signal may have come while stderr's buffer was being written.
        os.write(2, f"\n{self.requested}: stopping after this step; once more stops at once\n".encode())

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


@contextmanager
def not_terminated() -> Iterator[None]:
    """Put SIGTERM off to the end of the block, for good after an error in it, which must end the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    yield
    # None: a handler that is not Python's.
    signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)
    if came:
        os.kill(os.getpid(), came[0])
