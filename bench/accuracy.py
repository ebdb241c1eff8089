"""AUC lost to compression: every method and rate against dense, paired over seeds.

    python bench/accuracy.py --data_dir data/kaggle --output runs/accuracy --results bench/results/NAME.csv

Trains ``recemb train`` once per setting and seed, ``--jobs`` at a time on one thread each, skips what is
finished already, and prints the comparison. The CSV holds one line per setting, with machine,
versions, compiler and commit.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from bench.provenance import compiler_version, head_commit
from recemb.stack import versions
from recemb.training.html_report import write_report
from recemb.training.report import Setting, Spread, comparison_table, load_runs, summarise

_COLUMNS = (
    *("setting", "method", "seeds", "embedding_bytes", "compression_ratio", "auc", "auc_std"),
    *("auc_minus_dense", "auc_minus_dense_std", "logloss", "machine", "versions", "compiler", "commit"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="a directory made by recemb prepare")
    parser.add_argument("--output", required=True, type=Path, help="where the runs and the report go")
    parser.add_argument("--results", type=Path, help="a CSV of the figures")
    parser.add_argument("--methods", nargs="+", default=["tt", "qr", "robe", "md"])
    parser.add_argument("--rates", nargs="+", default=["10", "100"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--train", default="", help="further flags of recemb train, as one string")
    args = parser.parse_args()

    settings = [("dense", [])]
    settings += [
        (f"{m}-{r}", ["--method", m, "--compress_rate", r]) for r in args.rates for m in args.methods
    ]
    jobs = [
        (args.output / name / f"seed-{seed}", [*flags, "--seed", str(seed)])
        for seed in range(args.seeds)
        for name, flags in settings
    ]
    train_all(jobs, ["--data_dir", args.data_dir, *args.train.split()], args.jobs)
    runs = load_runs([args.output])
    print(comparison_table(runs))
    write_report(runs, args.output / "report")
    if args.results:
        _write_csv(args.results, summarise(runs))


def train_all(jobs: Sequence[tuple[Path, list[str]]], common: Sequence[str], workers: int | None) -> None:
    """Run ``recemb train`` for every (run directory, flags) that is not finished, on one thread each."""
    waiting = [job for job in jobs if not (job[0] / "result.json").exists()]
    with ThreadPoolExecutor(workers) as pool:
        done = pool.map(lambda job: _train(job[0], [*common, *job[1]]), waiting)
        for _ in tqdm(done, total=len(waiting), unit="run", disable=not waiting):
            pass


def _train(output: Path, flags: list[str]) -> None:
    command = [sys.executable, "-m", "recemb", "train", "--output", str(output), "--overwrite", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr[-2000:]}")


def _write_csv(path: Path, settings: list[Setting]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, 1 thread a run"
    stack = " ".join(f"{name}={version}" for name, version in versions().items())
    made_by = [machine, stack, compiler_version(), head_commit()]
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(_COLUMNS)
        for s in settings:
            figures = [*_pair(s.auc), *_pair(s.auc_loss), _pair(s.logloss)[0]]
            writer.writerow(
                [s.name, s.method, len(s.runs), s.embedding_bytes, f"{s.ratio:.2f}", *figures, *made_by]
            )


def _pair(spread: Spread | None) -> tuple[str, str]:
    if spread is None:
        return "", ""
    return f"{spread.mean:.5f}", "" if spread.std is None else f"{spread.std:.5f}"


if __name__ == "__main__":
    main()
