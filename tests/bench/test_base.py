"""Another commit's packages, and the child process that measures them."""

from __future__ import annotations

import csv
import os
import subprocess
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.base import Pair, checkout
from bench.guard import ROOT
from bench.ops import main
from bench.provenance import git, resolve
from bench.settings import BASE, FORWARD, OP
from bench.worker import Worker, WorkerError, alternate
from recemb.errors import ConfigError

needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")


@needs_git
def test_a_checkout_holds_the_packages_alone_and_goes_away() -> None:
    with checkout("HEAD") as tree:
        assert sorted(path.name for path in tree.iterdir() if path.is_dir()) == ["kernels", "recemb"]
        assert (tree / "kernels" / "recemb_kernels" / "build.py").is_file()
    assert not tree.exists()
    listed = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert str(tree) not in listed.stdout


@needs_git
def test_an_unknown_commit_is_named() -> None:
    with pytest.raises(ConfigError, match="--base no-such-commit: no such commit; see git log"):
        resolve("no-such-commit")


@needs_git
def test_two_commits_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clone, green, output = tmp_path / "clone", tmp_path / "test_green.py", tmp_path / "out"
    git(tmp_path, "clone", "--quiet", "--no-checkout", str(ROOT), str(clone))
    monkeypatch.setattr("bench.base.ROOT", clone)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    green.write_text("def test_it():\n    assert True\n")
    # Two trains fit into 0.1 MB, two tables of 64 kB do not.
    sizes = "--rows 1000 --batch 16 --ranks 4 --methods tt dense --paths op --rounds 2 --memory_gb 0.0001"
    words = [*sizes.split(), "--base", "HEAD", "--tests", str(green), "--output", str(output)]
    assert main(words) == 0
    commit = git(ROOT, "rev-parse", "--short", "HEAD").strip()
    with (output / "ops_custom_base.csv").open() as handle:
        base, this = csv.DictReader(handle)
    assert (base["case"], base["like"], base["ratio_like"]) == (f"TT R=4 @{commit}", "", "")
    assert (this["case"], this["like"]) == ("TT R=4", f"TT R=4 @{commit}")
    assert float(this["ratio_like"]) > 0
    assert {row["commit"].removesuffix("+") for row in (base, this)} == {commit}
    out = capsys.readouterr().out
    assert f"(x like = this checkout / {commit})" in out
    assert "not measured: uncompressed: two of its tables take 0.0 GB, more than is left" in out
    assert not list((clone / ".git" / "worktrees").glob("*"))


def test_a_worker_measures_its_own_checkout() -> None:
    setting = replace(BASE, rows=(1000,), batch=16)
    with closing(Worker(ROOT)) as worker:
        worker.build("dense", setting, "uncompressed", [OP, FORWARD])
        times = alternate([worker, worker], [f"dense {OP}", f"dense {FORWARD}"], 4)
        assert {key: [seconds.shape for seconds in both] for key, both in times.items()} == {
            "dense op": [(4,), (4,)],
            "dense forward": [(4,), (4,)],
        }
        assert all((seconds > 0).all() for both in times.values() for seconds in both)
        assert 0 < worker.peak_bytes() < 10**9
        with pytest.raises(WorkerError, match=r"ConfigError: .*collisions=4"):
            worker.build("qr", replace(setting, rows=(2,)), "QR mult c=4", [OP])
        worker.drop()
        with pytest.raises(WorkerError, match="KeyError"):
            worker.turn(f"dense {OP}", 0)


@pytest.mark.skipif(
    any(name in os.environ for name in ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")),
    reason="the environment says where threads run",
)
def test_the_main_threads_of_all_workers_run_on_one_core() -> None:
    with closing(Worker(ROOT)) as one, closing(Worker(ROOT)) as other:
        cores = [os.sched_getaffinity(worker.pid) for worker in (one, other)]
    assert len(cores[0]) == 1
    assert cores[0] == cores[1]


def test_a_pair_is_two_rows_with_the_ratio_to_the_commit() -> None:
    base, this = Pair(BASE, "TT R=16", OP, this=np.array([1.0, 2.0]), base=np.array([2.0, 4.0])).rows("main")
    assert (base.case, base.ratio_like) == ("TT R=16 @main", None)
    assert (this.case, this.like, this.ratio_like) == ("TT R=16", "TT R=16 @main", 0.5)
    assert (base.p50_us, this.p50_us) == (3e6, 1.5e6)
