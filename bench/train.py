"""A whole DLRM training step: compressed tables against one fbgemm TBE of all tables."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from fractions import Fraction

from bench.program import RESULTS, add_output, make_parser, positive, row_scale, run_program

_DESCRIPTION = """\
Time a DLRM training step (forward, loss, backward, all updates) on the 26 tables of Criteo Kaggle: 33.8 M
rows of 16 columns, 2.2 GB. The 7 largest tables as tensor trains of rank 32, the rest uncompressed, against
torchrec's model with all of them in one fbgemm TBE. Dense layers, fused row-wise Adagrad and batches are the
same; the models take turns, and the ratio is the median of the round-by-round ratios. Ids are Zipf 1.05.

The floor is the least time for the look-up's arithmetic and memory traffic and the linear layers' arithmetic.
Two commits are compared look-up by look-up, by recemb bench ops --base; there is no such flag here.
"""
_NAME = "train_kaggle"


def build_parser() -> argparse.ArgumentParser:
    """The flags; imports nothing heavy, so that --help is instant."""
    parser = make_parser("train", _DESCRIPTION)
    parser.add_argument(
        "--batch", type=positive, nargs="+", default=[2048, 4096, 16384], metavar="B", help="2048 4096 16384"
    )
    parser.add_argument(
        "--dense_optimizer", choices=("adagrad", "sgd"), default="adagrad", help="of the dense layers"
    )
    parser.add_argument(
        "--scale", type=row_scale, default=Fraction(1), metavar="S", help="of the rows, e.g. 1/100 (1)"
    )
    parser.add_argument("--rounds", type=positive, default=30, metavar="K", help="default %(default)s")
    parser.add_argument("--threads", type=positive, metavar="T", help="default: torch's choice")
    parser.add_argument(
        "--tests", nargs="+", metavar="PATH", help="must pass first (default tests/kernels tests/optim)"
    )
    add_output(parser, "CSV and plot", "bench/results at full scale")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; its exit code."""
    return run_program(build_parser(), argv, _run)


def _run(args: argparse.Namespace) -> int:
    if args.threads is not None:
        # Read as torch loads.
        os.environ["OMP_NUM_THREADS"] = str(args.threads)

    from bench.guard import TESTS, require_green

    sources = require_green(args.tests or TESTS)
    # After the tests: torch takes seconds to load.
    from bench.dlrm_step import Models, plot_rows, train_rows, train_table
    from bench.hand_over import core_to_core
    from bench.report import finish_files
    from bench.results import results_folder, this_machine, write_csv

    # A model of another size must not replace the results that git keeps.
    folder = results_folder(args.output, RESULTS if args.scale == 1 else None)
    machine = this_machine(sources)
    print(machine.heading())
    models = Models.build(args.scale, args.dense_optimizer)
    rows = []
    for batch in args.batch:
        rows += train_rows(models, batch, args.rounds)
        apart = core_to_core(rows[-1].hand_over_ns)
        print(f"\nB={batch:,}, {args.rounds} rounds{apart}\n{train_table(rows[-2:])}")
        if folder is not None:
            write_csv(folder / f"{_NAME}.csv", rows, machine)
    if folder is not None:
        finish_files(plot_rows(rows), folder, _NAME)
    return 0


if __name__ == "__main__":
    sys.exit(main())
