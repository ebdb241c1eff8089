"""Count a feature's distinct tokens in bounded memory: sorted runs that spill to disk, then one merge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.int64]

_MIN_CHUNK: Final = 1024


def combine_counts(tokens: Tokens, counts: Counts) -> tuple[Tokens, Counts]:
    """Sort by token and add up the counts of equal ones."""
    if tokens.size == 0:
        return tokens, counts
    order = np.argsort(tokens, kind="stable")
    tokens, counts = tokens[order], counts[order]
    starts = np.flatnonzero(np.concatenate([[True], tokens[1:] != tokens[:-1]]))
    return tokens[starts], np.add.reduceat(counts, starts)


def _count(tokens: Tokens) -> tuple[Tokens, Counts]:
    """The distinct values of ``tokens`` (which is sorted in place) and how often each occurs."""
    tokens.sort()
    starts = np.flatnonzero(np.concatenate([[tokens.size > 0], tokens[1:] != tokens[:-1]]))
    return tokens[starts], np.diff(np.append(starts, tokens.size))


@dataclass
class CountRun:
    """Tokens in rising order with their counts, in two flat files of little-endian uint32 and int64."""

    path: Path
    entries: int = 0

    def append(self, tokens: Tokens, counts: Counts) -> None:
        """Add entries whose tokens are above all those before."""
        for suffix, values in ((".tokens", tokens.astype("<u4")), (".counts", counts.astype("<i8"))):
            with open(f"{self.path}{suffix}", "ab") as handle:
                values.tofile(handle)
        self.entries += tokens.size

    def read(self, start: int, size: int) -> tuple[Tokens, Counts]:
        """Up to ``size`` entries from ``start``; read, for mapped pages would count as memory in use."""
        size = max(0, min(size, self.entries - start))
        tokens = np.fromfile(f"{self.path}.tokens", "<u4", size, offset=4 * start)
        counts = np.fromfile(f"{self.path}.counts", "<i8", size, offset=8 * start)
        return tokens, counts

    def blocks(self, size: int) -> Iterator[tuple[Tokens, Counts]]:
        """All entries, ``size`` at a time."""
        for start in range(0, self.entries, size):
            yield self.read(start, size)

    def delete(self) -> None:
        """Remove the files."""
        for suffix in (".tokens", ".counts"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)
        self.entries = 0


def _merge(runs: list[CountRun], max_entries: int) -> Iterator[tuple[Tokens, Counts]]:
    """The union of ``runs`` in token order, in blocks of about ``max_entries`` at most."""
    chunk = max(max_entries // max(len(runs), 1), _MIN_CHUNK)
    positions = [0] * len(runs)
    heads = [run.read(0, 0) for run in runs]
    while True:
        for index, run in enumerate(runs):
            if heads[index][0].size == 0 and positions[index] < run.entries:
                heads[index] = run.read(positions[index], chunk)
                positions[index] += heads[index][0].size
        lasts = [tokens[-1] for tokens, _ in heads if tokens.size]
        if not lasts:
            return
        # every run has all its tokens up to the smallest last one in its head
        limit = min(lasts)
        taken = []
        for index, (tokens, counts) in enumerate(heads):
            cut = int(np.searchsorted(tokens, limit, side="right"))
            taken.append((tokens[:cut], counts[:cut]))
            heads[index] = (tokens[cut:], counts[cut:])
        yield combine_counts(
            np.concatenate([tokens for tokens, _ in taken]), np.concatenate([counts for _, counts in taken])
        )


@dataclass
class TokenCounter:
    """Counts tokens; at most ``max_entries`` distinct ones and as many raw ones are held in memory.

    Args:
        work_path: prefix of the spill files, in an existing directory; they are removed by :meth:`finish`'s
            result.
        max_entries: the bound; an entry costs about 55 bytes at the peak of counting.
    """

    work_path: Path
    max_entries: int
    _pending: list[Tokens] = field(default_factory=list)
    _pending_size: int = 0
    _tokens: Tokens = field(default_factory=lambda: np.empty(0, np.uint32))
    _counts: Counts = field(default_factory=lambda: np.empty(0, np.int64))
    _runs: list[CountRun] = field(default_factory=list)

    def add(self, tokens: Tokens) -> None:
        """Count ``tokens`` (uint32 [n], any order)."""
        for start in range(0, tokens.size, self.max_entries):
            piece = tokens[start : start + self.max_entries]
            if self._pending_size + piece.size > self.max_entries:
                self._reduce()
            self._pending.append(piece)
            self._pending_size += piece.size

    def _reduce(self) -> None:
        tokens, counts = _count(np.concatenate([*self._pending, np.empty(0, np.uint32)]))
        self._pending, self._pending_size = [], 0
        self._tokens, self._counts = combine_counts(
            np.concatenate([self._tokens, tokens]), np.concatenate([self._counts, counts])
        )
        # one more buffer of raw tokens could double the distinct ones
        if self._tokens.size > self.max_entries // 2:
            self._spill(self._new_run(f".run{len(self._runs)}"))

    def _spill(self, run: CountRun) -> None:
        run.append(self._tokens, self._counts)
        self._runs.append(run)
        self._tokens, self._counts = np.empty(0, np.uint32), np.empty(0, np.int64)

    def _new_run(self, suffix: str) -> CountRun:
        run = CountRun(self.work_path.with_name(self.work_path.name + suffix))
        run.delete()  # left by a run that was killed
        return run

    def finish(self) -> tuple[CountRun, Counter[int]]:
        """All tokens with their counts as one run, and how many tokens have each count (``{count: tokens}``).

        The second is small whatever the first is: n look-ups have fewer than sqrt(2 n) different counts.
        """
        self._reduce()
        merged = self._new_run(".merged")
        histogram: Counter[int] = Counter()
        if self._runs:
            if self._tokens.size:
                self._spill(self._new_run(f".run{len(self._runs)}"))
            blocks = _merge(self._runs, self.max_entries)
        else:
            blocks = iter([(self._tokens, self._counts)])
        for tokens, counts in blocks:
            merged.append(tokens, counts)
            values, multiplicity = np.unique(counts, return_counts=True)
            histogram.update(dict(zip(values.tolist(), multiplicity.tolist(), strict=True)))
        for run in self._runs:
            run.delete()
        return merged, histogram
