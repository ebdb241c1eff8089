"""The speed that recemb aims at: one line per promise, looked up by setting, case and path."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.settings import (
    BASE,
    DENSE,
    HASHING,
    KAGGLE,
    LARGEST_TT,
    MD,
    MODULE,
    OP,
    QR,
    RANKS,
    ROBE,
    SCALE_RANK,
    STORED,
    TLTORCH,
    TT,
    G,
    M,
    Setting,
)

# A billion rows must cost what a million cost, and stay small: bench.scale.
SCALE_RATIO = 1.2
SCALE_PEAK_BYTES = 10**9


@dataclass(frozen=True)
class Target:
    """A bound on a ratio of step times.

    Args:
        limit: the bound.
        like: bound the ratio to the case's like-for-like reference, not the ratio to fbgemm's TBE.
        at_least: the ratio must reach the bound, not stay below it (a peer that must be slower).
    """

    limit: float
    like: bool = False
    at_least: bool = False

    def text(self) -> str:
        """``<=0.8``."""
        return f"{'>=' if self.at_least else '<='}{self.limit:g}"

    def met(self, ratio_tbe: float | None, ratio_like: float | None) -> bool | None:
        """Whether the ratio that counts keeps the bound; ``None`` when it was not measured."""
        ratio = ratio_like if self.like else ratio_tbe
        if ratio is None:
            return None
        return ratio >= self.limit if self.at_least else ratio <= self.limit


def _targets() -> dict[tuple[Setting, str, str], Target]:
    small, large = replace(BASE, batch=64), replace(BASE, batch=65536)
    sgd, wide, widest = replace(BASE, optimizer="sgd"), replace(BASE, dim=64), replace(BASE, dim=128)
    every = (*(f"{TT}{rank}" for rank in RANKS), *STORED)
    bounds = [
        *((BASE, f"{TT}{rank}", limit) for rank, limit in ((16, 0.5), (32, 0.8), (64, 2.0))),
        *((BASE, case, 0.5) for case in (QR, MD, HASHING)),
        (BASE, DENSE, 0.6),
        *((setting, ROBE, limit) for setting, limit in ((BASE, 0.3), (wide, 0.5), (widest, 0.8))),
        (sgd, f"{TT}16", 1.0),
        (sgd, f"{TT}32", 2.0),
        (large, f"{TT}32", 0.6),
        (wide, f"{TT}32", 1.2),
        (replace(BASE, ids="permuted"), f"{TT}32", 0.9),
        (replace(large, ids="permuted"), f"{TT}32", 0.9),
        (replace(BASE, ids="uniform"), f"{TT}32", 1.2),
        *((small, case, 1.0) for case in every),
    ]
    found = {(setting, case, OP): Target(limit) for setting, case, limit in bounds}
    # The whole embedding step of a model in one module call.
    found[KAGGLE, LARGEST_TT, MODULE] = Target(0.8)
    trains = [(setting, case) for setting, case, _ in bounds if case.startswith(TT)]
    trains += [(widest, f"{TT}{rank}") for rank in RANKS]
    trains += [(replace(BASE, rows=(n,)), f"{TT}{SCALE_RANK}") for n in (M, G)]
    for setting, case in trains:
        found[setting, TLTORCH + case.removeprefix(TT), OP] = Target(20, like=True, at_least=True)
    return found


TARGETS = _targets()
