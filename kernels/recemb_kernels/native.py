"""Which native kernels run here, and why others do not. One warning per op, then the plain torch path."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

from recemb_kernels.build import KernelUnavailableError, cache_dir, compiler

_T = TypeVar("_T")
OPS = ("tt_gather", "pooled_gather", "robe_gather", "check_bags")
_unavailable: dict[str, str] = {}


def attempt(op: str, call: Callable[[], _T]) -> _T | None:
    """``call()``, or ``None`` when the op's native kernel cannot be had here (warned about once)."""
    if op in _unavailable:
        return None
    try:
        return call()
    except KernelUnavailableError as error:
        _unavailable[op] = str(error)
        warnings.warn(
            f"recemb: {op} runs on plain torch, which is slower: {error}. See `recemb doctor`.", stacklevel=3
        )
        return None


def status() -> dict[str, str]:
    """Per op, what runs here: a sentence for ``recemb doctor``."""
    path = compiler()
    report = {}
    for op in OPS:
        if op in _unavailable:
            report[op] = f"plain torch: {_unavailable[op]}"
        elif path is None:
            report[op] = "plain torch: no C++ compiler found; install g++ or clang++, or set CXX"
        else:
            report[op] = f"native CPU, compiled on first use by {path} into {cache_dir()}"
    return report
