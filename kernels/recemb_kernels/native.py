"""Which native kernels run here, and why others do not. One warning a reason, then the plain torch path."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable
from threading import Lock
from typing import TypeVar

from recemb_kernels.build import KernelUnavailableError, compiler

_T = TypeVar("_T")
STEP = "training_step"
OPS = ("tt_gather", "pooled_gather", "robe_gather", "check_bags", "cache_split", STEP)
_unavailable: dict[str, str] = {}
_said: set[str] = set()
_lock = Lock()


def attempt(
    op: str, call: Callable[[], _T], shape: object = None, instead: str = "on plain torch"
) -> _T | None:
    """``call()``, or ``None`` when a kernel it needs cannot be had here; each reason is warned about once.

    Args:
        op: the op.
        call: compiles or runs its kernel.
        shape: what the kernel is compiled for, so that a failure is remembered of this shape only.
        instead: what it runs on then.
    """
    what = op if shape is None else f"{op} of {shape}"
    if op in _unavailable or what in _unavailable:
        return None
    try:
        return call()
    except KernelUnavailableError as error:
        with _lock:  # Shapes are tried side by side.
            own = (error.reason, f"{error.reason}: ")
            # That steps are taken from Python does not say that a table runs on plain torch.
            others = [text for named, text in _unavailable.items() if named != STEP or what == STEP]
            known = any(text == own[0] or text.startswith(own[1]) for text in others)
            _unavailable[what] = str(error)
        if not known:
            warnings.warn(
                f"recemb: {what}, with all that fails alike, runs {instead}, which is slower: {error}. "
                "See `recemb doctor`.",
                stacklevel=3,
            )
        return None


def say_once(table: str, reason: str) -> None:
    """Warn that no kernel is made for a table such as this one; once a reason."""
    with _lock:
        known = reason in _said
        _said.add(reason)
    if not known:
        warnings.warn(f"recemb: table {table!r} runs on plain torch, which is slower: {reason}", stacklevel=3)


def status(failure: str = "") -> dict[str, str]:
    """Per op, what runs here: a sentence for ``recemb doctor``.

    Args:
        failure: why no kernel can be had at all, where that is so.
    """
    report = {}
    for op in OPS:
        failed = [reason for what, reason in _unavailable.items() if what.startswith(op)]
        if failure or failed:
            # Without any kernel nothing is left to step for.
            instead = "steps are taken from Python" if op == STEP and not failure else "plain torch"
            report[op] = f"{instead}: {failure or failed[0]}"
        else:
            report[op] = f"native CPU, compiled on first use by {shlex.join(compiler())}"
    return report
