"""Prints figures as they come, keeps the CSV up to date, and draws the plot at the end."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from tqdm import tqdm

from bench.base import checkout, compare_with
from bench.guard import ROOT
from bench.hand_over import core_to_core
from bench.limits import missed_lines
from bench.plot import MOST_PAGES, save_plot
from bench.provenance import resolve
from bench.results import Row, results_folder, table, this_machine, write_csv
from bench.scale import measure_scale
from bench.session import Skipped, Tables, compare
from bench.settings import Comparison
from bench.worker import Worker
from recemb.training.plots import MISSING_MATPLOTLIB, have_matplotlib

_MEMORY_SHARE = 0.7


class Report:
    """The rows of one run.

    Args:
        output: the folder that the user named, or ``None``.
        default: the folder used without one; nothing is written when it cannot be, or when this is ``None``.
        name: stem of the files.
        sources: hash of what was measured.
    """

    def __init__(self, output: Path | None, default: Path | None, name: str, sources: str) -> None:
        self.name = name
        self.machine = this_machine(sources)
        self.rows: list[Row] = []
        self.folder = results_folder(output, default)
        print(self.machine.heading())

    def add(self, title: str, rows: Sequence[Row], notes: Sequence[str] = ()) -> None:
        """Print a table and write the CSV anew."""
        lines = ["", title, table(rows), *map(_note, notes)]
        tqdm.write("\n".join(lines), file=sys.stdout)
        self.rows += rows
        if self.folder is not None and self.rows:
            write_csv(self.folder / f"{self.name}.csv", self.rows, self.machine)

    def finish(self) -> None:
        """Count the targets, draw the plot, name the files."""
        judged = [row for row in self.rows if row.met is not None]
        if judged:
            print(f"\ntargets: {sum(bool(row.met) for row in judged)} of {len(judged)} met")
            for line in missed_lines(self.rows):
                print(_note(line))
        if self.folder is None or not self.rows:
            return
        finish_files(self.rows, self.folder, self.name)


def finish_files(rows: Sequence[Row], folder: Path, name: str) -> None:
    """Draw the plot beside ``name``.csv, or say why not, and name the files."""
    plots = []
    if not have_matplotlib():
        print(MISSING_MATPLOTLIB, file=sys.stderr)
    else:
        plots = save_plot(rows, folder, name)
        if not plots:
            print(
                f"no plot: there is no ratio to TBE, or more than {MOST_PAGES} pages of them", file=sys.stderr
            )
    print(f"written: {', '.join(map(str, [folder / f'{name}.csv', *plots]))}", file=sys.stderr)


def run_comparisons(
    comparisons: Sequence[Comparison], rounds: int, memory_gb: float | None, report: Report, with_scale: bool
) -> int:
    """Measure every comparison and, when asked, a billion rows; exit code 0."""
    tables = Tables(memory_limit(memory_gb))
    absent: dict[str, str] = {}
    with tqdm(comparisons, unit="setting", disable=None) as bar:
        for comparison in bar:
            bar.set_postfix_str(comparison.setting.title())
            rows, skipped = compare(comparison, tables, rounds)
            report.add(_heading(comparison, rows), rows, [_skip_line(case) for case in skipped])
            absent |= {case.case: case.reason for case in skipped if "not installed" in case.reason}
    tables.clear()
    if with_scale:
        rows, notes = measure_scale(rounds)
        report.add("a billion rows against a million, D=16 B=4,096 (x like = over N=1M)", rows, notes)
    report.finish()
    for reason in dict.fromkeys(absent.values()):
        names = ", ".join(case for case in absent if absent[case] == reason)
        print(_note(f"absent peers: {names}: {reason}"))
    return 0


def run_base(
    comparisons: Sequence[Comparison], ref: str, rounds: int, memory_gb: float | None, report: Report
) -> int:
    """Measure our cases in this checkout and at ``ref``, alternately; exit code 0."""
    # The figures outlive a name such as HEAD~1 or a branch.
    commit, limit = resolve(ref), memory_limit(memory_gb)
    with checkout(commit) as tree, ExitStack() as stack:
        workers = [stack.enter_context(closing(Worker(root))) for root in (ROOT, tree)]
        bar = stack.enter_context(tqdm(comparisons, unit="setting", disable=None))
        for comparison in bar:
            bar.set_postfix_str(comparison.setting.title())
            rows, skipped = compare_with(workers, commit, comparison, rounds, limit)
            title = f"{comparison.setting.title()} (x like = this checkout / {commit})"
            report.add(title, rows, [_skip_line(case) for case in skipped])
    report.finish()
    return 0


def memory_limit(gigabytes: float | None) -> float:
    """Bytes that tables may take: ``--memory_gb``, or 70 % of the machine's memory."""
    if gigabytes is not None:
        return gigabytes * 1e9
    return _MEMORY_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _heading(comparison: Comparison, rows: Sequence[Row]) -> str:
    if not rows:
        return comparison.setting.title()
    row, fewest, most = rows[0], *(pick(row.rounds for row in rows) for pick in (min, max))
    fewer = f", slow steps {fewest} or more" if fewest < most else ""
    return (
        f"{row.setting}, {row.distinct:,.0f} distinct ids a batch, {most} rounds{fewer}\n"
        f"floor: GEMM {row.gemm_gflop_s:,.0f} GFLOP/s, copy {row.copy_gbyte_s:.1f} GB/s, "
        f"random rows {row.gather_gbyte_s:.1f} GB/s{core_to_core(row.hand_over_ns)}"
    )


def _note(text: str) -> str:
    return textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def _skip_line(skipped: Skipped) -> str:
    return f"not measured: {skipped.case}: {skipped.reason}"
