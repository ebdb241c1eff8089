"""Which native kernels run here, and why others do not. One warning a reason, then the plain torch path."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable
from threading import Lock
from typing import TypeVar

from recemb_kernels.build import KernelUnavailableError, compiler

_T = TypeVar("_T")
OPS = ("tt_gather", "pooled_gather", "robe_gather", "check_bags", "cache_split")
_unavailable: dict[str, str] = {}
_lock = Lock()


def attempt(op: str, call: Callable[[], _T], shape: object = None) -> _T | None:
    """``call()``, or ``None`` when a kernel it needs cannot be had here; each reason is warned about once.

    Args:
        op: the op.
        call: compiles or runs its kernel.
        shape: what the kernel is compiled for, so that a failure is remembered of this shape only.
    """
    what = op if shape is None else f"{op} of {shape}"
    if op in _unavailable or what in _unavailable:
        return None
    try:
        return call()
    except KernelUnavailableError as error:
        with _lock:  # Shapes are tried side by side.
            own = (error.reason, f"{error.reason}: ")
            known = any(text == own[0] or text.startswith(own[1]) for text in _unavailable.values())
            _unavailable[what] = str(error)
        if not known:
            warnings.warn(
                f"recemb: {what}, with all that fails alike, runs on plain torch, which is slower: {error}. "
                "See `recemb doctor`.",
                stacklevel=3,
            )
        return None


def status(failure: str = "") -> dict[str, str]:
    """Per op, what runs here: a sentence for ``recemb doctor``.

    Args:
        failure: why no kernel can be had at all, where that is so.
    """
    report = {}
    for op in OPS:
        failed = [reason for what, reason in _unavailable.items() if what.startswith(op)]
        if failed or failure:
            report[op] = f"plain torch: {(failed or [failure])[0]}"
        else:
            report[op] = f"native CPU, compiled on first use by {shlex.join(compiler())}"
    return report
