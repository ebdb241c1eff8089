"""How far apart the threads' cores are: what a step that they share waits for whenever they hand data over.

A virtual machine does not say where its cores lie, and they move: on an EPYC two of them may share a
third-level cache in one minute and none in the next, which our steps show and a matrix product does not.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from recemb_kernels.build import KernelUnavailableError, load

_SOURCE = Path(__file__).with_suffix(".cpp")
# Cores of one third-level cache take 25 to 80 ns; those of two, or of two sockets, more.
FAR = 100.0


class HandOver:
    """Nanoseconds that a written cache line takes from one core to another, measured at each call.

    Args:
        measure: by whose threads; this process's own when ``None``.
    """

    def __init__(self, measure: Callable[[], float | None] | None = None) -> None:
        self._measure = measure
        self._found: list[float] = []

    def __call__(self) -> None:
        """Measure it, in a fraction of a millisecond."""
        found = hand_over() if self._measure is None else self._measure()
        if found is not None:
            self._found.append(found)

    @property
    def median(self) -> float | None:
        """Of all calls; ``None`` where it cannot be measured."""
        return float(np.median(self._found)) if self._found else None


def hand_over() -> float | None:
    """Nanoseconds one way between the first of torch's threads and the one that is farthest from it.

    ``None`` with one thread, with more threads than cores, which would wait for each other to be scheduled,
    and without a compiler.
    """
    threads, measure = torch.get_num_threads(), _measure()
    if measure is None:
        return None
    return float(measure(threads)) or None


@lru_cache(maxsize=1)
def _measure() -> ctypes._NamedFuncPointer | None:
    try:
        function = load("hand_over", [_SOURCE], {}).recemb_hand_over
    except KernelUnavailableError:
        return None
    function.argtypes, function.restype = (ctypes.c_int64,), ctypes.c_double
    return function


def core_to_core(nanoseconds: float | None) -> str:
    """The end of a line about the machine, and another line where that needs a word."""
    if nanoseconds is None:
        return ""
    far = "\n(far: steps of several threads are slow)" if nanoseconds > FAR else ""
    return f", core to core {nanoseconds:.0f} ns{far}"
