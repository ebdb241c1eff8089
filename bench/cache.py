"""A hot-row cache over a tensor train: hit rate, step time and AUC against its size."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.program import RESULTS, add_output, make_parser, positive, rate, run_program
from recemb.errors import ConfigError

_DESCRIPTION = """\
Hit rate and step time (forward, backward, fused row-wise Adagrad) of a tensor-train table with a cache of
its hottest rows, on Zipf 1.05 ids that never repeat a batch, against the same table without a cache. The
ideal hit rate is that of the C most frequent ids. Permuted ids tell nothing of their frequency.

With --data_dir also the AUC on a prepared click log, by runs of recemb train that are paired by seed:
uncompressed, tensor trains at --compress_rate, the same with caches of --fractions on top (their bytes are
counted), and trains without a cache that take the same bytes.
"""
TESTS = ("tests/cache",)


def build_parser() -> argparse.ArgumentParser:
    """The flags; imports nothing heavy, so that --help is instant."""
    parser = make_parser("cache", _DESCRIPTION)
    add = parser.add_argument
    add("--fractions", type=float, nargs="+", default=[0.001, 0.01, 0.05], metavar="F", help="of the rows")
    add("--policies", nargs="+", default=["lfu", "importance"], choices=("lfu", "lru", "importance"))
    kinds = ("zipf", "permuted")
    add("--ids", nargs="+", default=["zipf"], choices=kinds, help="default zipf: most frequent first")
    add("--rows", type=positive, default=1_000_000, metavar="N", help="of the Zipf table (%(default)s)")
    add("--batch", type=positive, default=4096, metavar="B", help="default %(default)s")
    add("--rank", type=positive, default=16, metavar="R", help="default %(default)s")
    add("--steps", type=int, default=512, metavar="K", help="before the clock starts (default %(default)s)")
    add("--rounds", type=positive, default=128, metavar="K", help="timed steps (default %(default)s)")
    add("--threads", type=positive, metavar="T", help="default: torch's choice")
    add("--tests", nargs="+", metavar="PATH", help="must pass first (default tests/cache)")
    add("--data_dir", metavar="DIR", help="a directory made by recemb prepare: measure AUC too")
    add("--runs", type=Path, metavar="DIR", help="where trainings go; finished ones are kept")
    add("--compress_rate", type=rate, default=100.0, metavar="R", help="default %(default)s")
    add("--seeds", type=positive, default=5, metavar="K", help="default %(default)s")
    add("--jobs", type=positive, default=os.cpu_count(), metavar="K", help="trainings at a time")
    add("--train", default="", metavar="FLAGS", help="further flags of recemb train, as one string")
    add_output(parser, "CSV and plot")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; its exit code."""
    return run_program(build_parser(), argv, _run)


def _run(args: argparse.Namespace) -> int:
    if args.steps < 0:
        raise ConfigError("--steps must be >= 0")
    if not all(0 < fraction <= 1 for fraction in args.fractions):
        raise ConfigError("--fractions must lie in (0, 1]")
    if args.data_dir is not None and args.runs is None:
        raise ConfigError("--data_dir trains models: say where they go with --runs")
    if args.threads is not None:
        # Read as torch loads.
        os.environ["OMP_NUM_THREADS"] = str(args.threads)

    from bench.guard import require_green

    sources = require_green(args.tests or TESTS)
    # After the tests: torch takes seconds to load.
    from bench.cache_auc import auc_rows, auc_table
    from bench.cache_plot import save_cache_plot
    from bench.cache_steps import step_rows, step_table
    from bench.results import results_folder, this_machine, write_csv

    folder = results_folder(args.output, RESULTS)
    machine = this_machine(sources)
    print(machine.heading())
    steps = step_rows(args)
    print(step_table(steps))
    accuracies = []
    if args.data_dir is not None:
        accuracies = auc_rows(args)
        print(f"\n{auc_table(accuracies)}")
    if folder is None:
        return 0
    write_csv(folder / "cache_zipf.csv", steps, machine)
    if accuracies:
        write_csv(folder / "cache_auc.csv", accuracies, machine)
    written = [folder / "cache_zipf.csv", *save_cache_plot(steps, accuracies, folder)]
    print(f"written: {', '.join(map(str, written))}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
