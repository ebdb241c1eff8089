"""The figures of hot-row caches, free of torch."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class CacheMetrics:
    """One cache, or several together, since training began.

    Attributes:
        rows: C, how many rows it holds when full.
        cached_rows: how many it holds.
        lookups: look-ups counted since the first exchange of rows: those of one step in ``track_every``.
        hit_rate: part of them that found their row in the cache.
        promotions: rows that have entered.
        evictions: rows that have left.
        write_back_error: of the rows that have left, |row just after - cached row| over the same without
            writing back, in the Frobenius norm over all of them: 0 keeps all that was learned, 1 nothing.
        learned: that norm without writing back, what the error is a part of.
    """

    rows: int
    cached_rows: int
    lookups: int
    hit_rate: float
    promotions: int
    evictions: int
    write_back_error: float
    learned: float


def total(metrics: Collection[CacheMetrics]) -> CacheMetrics:
    """Several caches as one: sums, the hit rate by look-ups, errors in the norm over all of their rows."""
    lookups = sum(m.lookups for m in metrics)
    lost = math.hypot(*(m.learned * m.write_back_error for m in metrics))
    learned = math.hypot(*(m.learned for m in metrics))
    return CacheMetrics(
        rows=sum(m.rows for m in metrics),
        cached_rows=sum(m.cached_rows for m in metrics),
        lookups=lookups,
        hit_rate=sum(m.lookups * m.hit_rate for m in metrics) / max(1, lookups),
        promotions=sum(m.promotions for m in metrics),
        evictions=sum(m.evictions for m in metrics),
        write_back_error=lost / learned if learned else 0.0,
        learned=learned,
    )
