"""What the machine itself can do, measured in the same run with the same threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

_GEMM = 1024
_COPY_NUMEL = 2**26
_GATHER_BYTES = 2**29
_GATHERED = 2**17
_REPEATS = 7
_OTHER_BYTES = 2**24
_UPDATES = 51


@dataclass(frozen=True)
class Floor:
    """Best of a few repetitions.

    Args:
        gemm: GFLOP/s of a 1024 x 1024 x 1024 float32 matrix product.
        copy: GB/s of a 256 MB copy, reads and writes counted.
        gather: GB/s of reading rows of D float32 at random from 512 MB, reads alone counted.
    """

    gemm: float
    copy: float
    gather: float

    def arithmetic(self, flop: float) -> float:
        """Microseconds of so much arithmetic, as a matrix product."""
        return flop / self.gemm / 1e3

    def memory(self, weights: float, streams: float) -> float:
        """Microseconds of so many bytes of weights, as random rows, and of others, as a copy."""
        return weights / self.gather / 1e3 + streams / self.copy / 1e3


def floor(dim: int) -> Floor:
    """The floor for rows of ``dim`` columns."""
    gemm, copy = _gemm_and_copy()
    return Floor(gemm, copy, _gather(dim))


def update_growth(small: int, large: int) -> float:
    """Seconds that ``large`` bytes take more than ``small`` ones to be read and written, each in one block.

    Other memory goes through the cores' own caches before. Median of differences; the sizes take turns.
    """
    blocks, other = [torch.zeros(n // 4) for n in (small, large)], torch.zeros(_OTHER_BYTES // 4)
    growth = []
    for turn in range(_UPDATES):
        times = [0.0, 0.0]
        for k in (0, 1) if turn % 2 else (1, 0):
            other.add_(1)
            started = time.perf_counter()
            blocks[k].add_(1)
            times[k] = time.perf_counter() - started
        growth.append(times[1] - times[0])
    return sorted(growth)[_UPDATES // 2]


@lru_cache(maxsize=1)
def _gemm_and_copy() -> tuple[float, float]:
    left, right = torch.randn(_GEMM, _GEMM), torch.randn(_GEMM, _GEMM)
    out = torch.empty(_GEMM, _GEMM)
    gemm = 2 * _GEMM**3 / _best(lambda: torch.mm(left, right, out=out))
    source, target = torch.zeros(_COPY_NUMEL), torch.zeros(_COPY_NUMEL)
    copy = 8 * _COPY_NUMEL / _best(lambda: target.copy_(source))
    return gemm / 1e9, copy / 1e9


@lru_cache(maxsize=8)
def _gather(dim: int) -> float:
    # Written, not left to the allocator: untouched pages all are the same page of zeros.
    table = torch.ones(_GATHER_BYTES // (4 * dim), dim)
    turns = [torch.randint(table.shape[0], (_GATHERED,)) for _ in range(_REPEATS + 1)]
    out = torch.empty(_GATHERED, dim)
    return 4 * dim * _GATHERED / _best(lambda: torch.index_select(table, 0, turns.pop(), out=out)) / 1e9


def _best(call: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls, after one that does not count."""
    call()
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)
