"""This checkout's recemb against another commit's, by the benchmark code of this checkout."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from bench.guard import ROOT
from bench.hand_over import HandOver
from bench.measure import Seconds, percentiles, ratio
from bench.provenance import git
from bench.results import Row
from bench.session import Skipped, case_bytes, describe
from bench.settings import Comparison, Setting, is_ours
from bench.worker import Worker, WorkerError, alternate
from recemb.errors import ConfigError


@dataclass(frozen=True)
class Pair:
    """A case timed in both checkouts, a round each in turn."""

    setting: Setting
    case: str
    path: str
    this: Seconds
    base: Seconds

    def rows(self, commit: str) -> list[Row]:
        """The commit's figures, then this checkout's with the ratio to it."""
        both = [(f"{self.case} @{commit}", self.base, ""), (self.case, self.this, f"{self.case} @{commit}")]
        return [self._row(name, times, like) for name, times, like in both]

    def _row(self, name: str, times: Seconds, like: str) -> Row:
        spread = percentiles(times)
        return Row(
            **describe(self.setting),
            distinct=None,
            case=name,
            path=self.path,
            table_bytes=case_bytes(self.case, self.setting),
            rounds=len(times),
            p20_us=spread.p20,
            p50_us=spread.p50,
            p80_us=spread.p80,
            like=like,
            ratio_like=ratio(times, self.base) if like else None,
        )


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """recemb and its kernels as of a commit, in a temporary worktree.

    Raises:
        ConfigError: no such commit, or this is no git checkout.
    """
    with tempfile.TemporaryDirectory(prefix="recemb-base-") as folder:
        tree = Path(folder).resolve() / "tree"
        git(ROOT, "worktree", "add", "--quiet", "--detach", "--no-checkout", str(tree), commit)
        try:
            # The packages alone: the commit's own benchmark must not shadow this one.
            git(tree, "checkout", "--quiet", commit, "--", "recemb", "kernels")
            yield tree
        finally:
            git(ROOT, "worktree", "remove", "--force", str(tree))


def compare_with(
    workers: Sequence[Worker], commit: str, comparison: Comparison, rounds: int, memory_limit: float
) -> tuple[list[Row], list[Skipped]]:
    """Time our cases of a comparison in two workers, this checkout's and the commit's.

    Returns:
        Two rows a case and path, the commit's first; and the cases that one of them cannot measure.
    """
    setting, paths = comparison.setting, comparison.paths
    ready: list[str] = []
    skipped: list[Skipped] = []
    taken = 0
    for case in filter(is_ours, comparison.cases):
        try:
            needed = len(workers) * case_bytes(case, setting)
            if taken + needed > memory_limit:
                skipped.append(
                    Skipped(case, f"two of its tables take {needed / 1e9:.1f} GB, more than is left")
                )
                continue
            for worker in workers:
                worker.build(case, setting, case, paths)
            taken += needed
            ready.append(case)
        except (WorkerError, ConfigError) as error:
            skipped.append(Skipped(case, str(error)))
    apart = HandOver(workers[0].hand_over)
    apart()
    times = alternate(workers, [f"{case} {path}" for path in paths for case in ready], rounds)
    apart()
    for worker in workers:
        worker.drop()
    rows = []
    for path in paths:
        for case in ready:
            this, base = times[f"{case} {path}"]
            rows += Pair(setting, case, path, this, base).rows(commit)
    return [replace(row, hand_over_ns=apart.median) for row in rows], skipped
