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
from bench.session import case_bytes, describe
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
    tree: Path, comparison: Comparison, rounds: int, memory_limit: float
) -> Iterator[Pair | str]:
    """Time our cases of a comparison in this checkout and in ``tree``, or say why one cannot be."""
    workers = [Worker(ROOT), Worker(tree)]
    try:
        for case in filter(is_ours, comparison.cases):
            for path in comparison.paths:
                yield _pair(workers, comparison.setting, case, path, rounds, memory_limit)
    finally:
        for worker in workers:
            worker.close()


def _pair(
    workers: Sequence[Worker], setting: Setting, case: str, path: str, rounds: int, memory_limit: float
) -> Pair | str:
    try:
        if 2 * case_bytes(case, setting) > memory_limit:
            return f"{case}: two of its tables do not fit in {memory_limit / 1e9:.1f} GB"
        for worker in workers:
            worker.build(case, setting, case, path)
        this, base = alternate([(worker, case) for worker in workers], rounds)
        return Pair(setting, case, path, this, base)
    except (WorkerError, ConfigError) as error:
        return f"{case}: {error}"
    finally:
        for worker in workers:
            worker.drop()


def _git(folder: Path, *words: str, hint: str = "") -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise ConfigError(
            f"{hint or 'git ' + words[0]}: {said[-1] if said else 'no such commit; see git log --oneline'}"
        )
    return done.stdout
