"""How often the rows of an embedding table are looked up: the figures that caches and planners start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class CountHistogram:
    """A multiset of counts: ``rows[i]`` rows were looked up ``counts[i]`` times; counts fall strictly."""

    counts: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]

    @classmethod
    def of(cls, counts: npt.NDArray[np.int64]) -> CountHistogram:
        """The histogram of one count per row, [N] in any order."""
        values, rows = np.unique(counts, return_counts=True)
        return cls(values[::-1].astype(np.int64), rows[::-1].astype(np.int64))

    @classmethod
    def of_mapping(cls, rows_by_count: Mapping[int, int]) -> CountHistogram:
        """From ``{count: rows}``."""
        items = sorted(rows_by_count.items(), reverse=True)
        return cls(np.array([c for c, _ in items], np.int64), np.array([r for _, r in items], np.int64))

    def with_row(self, count: int) -> CountHistogram:
        """The same with one more row, looked up ``count`` times."""
        rows = dict(zip(self.counts.tolist(), self.rows.tolist(), strict=True))
        rows[count] = rows.get(count, 0) + 1
        return CountHistogram.of_mapping(rows)

    @property
    def num_rows(self) -> int:
        """Rows in all."""
        return int(self.rows.sum())

    @property
    def lookups(self) -> int:
        """Look-ups in all."""
        return int((self.rows * self.counts).sum())

    def top_lookups(self, rows: int) -> int:
        """Look-ups of the ``rows`` most frequent rows."""
        before = np.cumsum(self.rows) - self.rows
        taken = np.clip(rows - before, 0, self.rows)
        return int((taken * self.counts).sum())

    def top_share(self) -> dict[str, float]:
        """Share of the look-ups that fall on the 1, 10, 100, ... most frequent rows, up to all of them."""
        total = max(self.lookups, 1)
        sizes = [10**power for power in range(20) if 10**power < self.num_rows]
        return {str(size): self.top_lookups(size) / total for size in [*sizes, self.num_rows]}

    def top_percent_share(self, percent: float = 1.0) -> float:
        """Share of the look-ups on the most frequent ``percent`` % of the rows (at least one row)."""
        rows = max(1, int(self.num_rows * percent / 100))
        return self.top_lookups(rows) / max(self.lookups, 1)

    def log2_buckets(self) -> list[dict[str, int]]:
        """Rows and look-ups by count in [2^k, 2^(k+1)); rows never looked up come first, with min_count 0."""
        buckets: dict[int, list[int]] = {}
        for count, rows in zip(self.counts.tolist(), self.rows.tolist(), strict=True):
            lowest = 0 if count == 0 else 1 << (count.bit_length() - 1)
            bucket = buckets.setdefault(lowest, [0, 0])
            bucket[0] += rows
            bucket[1] += rows * count
        return [{"min_count": low, "rows": r, "lookups": n} for low, (r, n) in sorted(buckets.items())]


def frequency_summary(table_rows: CountHistogram, tokens: CountHistogram) -> dict[str, Any]:
    """A feature's frequency entries in ``stats.json``, all over the training split.

    ``top_share`` and ``top_1_percent_share`` are over the rows of the embedding table (the out-of-vocabulary
    row is one of them), ``count_histogram`` over the distinct tokens before rare ones are merged.
    """
    return {
        "top_share": table_rows.top_share(),
        "top_1_percent_share": table_rows.top_percent_share(),
        "count_histogram": tokens.log2_buckets(),
    }
