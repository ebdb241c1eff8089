"""This checkout's recemb against another commit's, by the benchmark code of this checkout."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.guard import ROOT
from bench.measure import Seconds, percentiles, ratio
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

    def rows(self, ref: str) -> list[Row]:
        """The commit's figures, then this checkout's with the ratio to it."""
        both = [(f"{self.case} @{ref}", self.base, ""), (self.case, self.this, f"{self.case} @{ref}")]
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
def checkout(ref: str) -> Iterator[Path]:
    """recemb and its kernels as of ``ref``, in a temporary worktree.

    Raises:
        ConfigError: no such commit, or this is no git checkout.
    """
    commit = _git(ROOT, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}", hint=f"--base {ref}").strip()
    with tempfile.TemporaryDirectory(prefix="recemb-base-") as folder:
        tree = Path(folder).resolve() / "tree"
        _git(ROOT, "worktree", "add", "--quiet", "--detach", "--no-checkout", str(tree), commit)
        try:
            # The packages alone: the commit's own benchmark must not shadow this one.
            _git(tree, "checkout", "--quiet", commit, "--", "recemb", "kernels")
            yield tree
        finally:
            _git(ROOT, "worktree", "remove", "--force", str(tree))


def compare_with(
    workers: Sequence[Worker], ref: str, comparison: Comparison, rounds: int, memory_limit: float
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
    times = alternate(workers, [f"{case} {path}" for path in paths for case in ready], rounds)
    for worker in workers:
        worker.drop()
    rows = []
    for path in paths:
        for case in ready:
            this, base = times[f"{case} {path}"]
            rows += Pair(setting, case, path, this, base).rows(ref)
    return rows, skipped


def _git(folder: Path, *words: str, hint: str = "") -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise ConfigError(
            f"{hint or 'git ' + words[0]}: {said[-1] if said else 'no such commit; see git log --oneline'}"
        )
    return done.stdout
