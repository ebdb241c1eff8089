"""``recemb report``: compare finished runs on the terminal, as a plot and as one HTML file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_DESCRIPTION = """\
Compare runs of recemb train. Runs of one setting are averaged over their seeds; labels hold what differs
between settings. The AUC loss is taken against the dense run of the same seed and training: data (by their
contents), model, optimizer, batch, epochs, evaluations. Where there is none, the report says what differs.
samples/s and ms/step leave out each process's first step, in which kernels are compiled.

Prints a table and writes report.html (self-contained), comparison.png and comparison.svg.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the verb and its flags."""
    parser = subparsers.add_parser(
        "report",
        help="compare finished runs: table, plot, HTML",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run directory, or a directory of run directories"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="where the report is written")


def run(args: argparse.Namespace) -> int:
    """Write the report; exit code 0."""
    from recemb.training.html_report import write_report
    from recemb.training.report import comparison_table, load_runs

    runs = load_runs([Path(path) for path in args.runs])
    print(comparison_table(runs))
    files = write_report(runs, Path(args.output))
    print(f"written: {', '.join(map(str, files))}", file=sys.stderr)
    return 0
