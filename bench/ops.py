"""Step time of compressed look-ups against fbgemm's uncompressed one and other peers, in one process."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from bench.program import RESULTS, add_output, positive, run_program
from recemb.errors import ConfigError

_DESCRIPTION = """\
Time a training step (forward, backward, fused update) or a forward pass of one look-up, ours and the peers'.
Cases take turns, round by round; a ratio is the median of the round-by-round ratios to fbgemm's TBE.

paths: op = ready ids and offsets, as TBE is given; module = a KeyedJaggedTensor through the whole collection;
       forward = op without gradients (inference).
"""
_EPILOG = """\
examples:
  recemb bench ops                                            every target, 3-5 minutes
  recemb bench ops --preset sample                            12 settings of the grid, 4-6 minutes
  recemb bench ops --rows 1000000 --ranks 32 --batch 64 4096 --ids permuted
  recemb bench ops --preset quick --base HEAD~1               this checkout against another commit
"""
_FIELDS = ("rows", "dim", "optimizer", "batch", "hots", "ids")
_ONE_OFF = (*_FIELDS, "methods", "ranks", "paths")


def build_parser() -> argparse.ArgumentParser:
    """The flags; imports nothing heavy, so that --help is instant."""
    parser = argparse.ArgumentParser(
        prog="recemb bench ops",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preset",
        choices=("targets", "grid", "sample", "quick"),
        help="targets (default): every promised figure; grid: all sizes, hours; sample: a dozen settings "
        "of the grid; quick: a minute",
    )
    one = parser.add_argument_group(
        "one-off sizes", "any of these replaces the preset; several values make all combinations"
    )
    one.add_argument("--rows", type=positive, nargs="+", metavar="N", help="rows of the table (10000000)")
    one.add_argument("--dim", type=positive, nargs="+", metavar="D", help="columns (16)")
    one.add_argument("--batch", type=positive, nargs="+", metavar="B", help="bags (4096)")
    one.add_argument("--hots", type=positive, nargs="+", metavar="H", help="ids in a bag (1)")
    one.add_argument("--ids", choices=("zipf", "permuted", "uniform"), nargs="+", help="default zipf")
    one.add_argument("--optimizer", choices=("rowwise_adagrad", "sgd"), nargs="+", help="rowwise_adagrad")
    one.add_argument(
        "--methods",
        choices=("tt", "robe", "qr", "md", "hashing", "dense"),
        nargs="+",
        help="which of ours (default all)",
    )
    one.add_argument("--ranks", type=positive, nargs="+", metavar="R", help="tensor-train ranks (16 32 64)")
    one.add_argument("--paths", choices=("op", "module", "forward"), nargs="+", help="default all")
    parser.add_argument("--rounds", type=positive, default=50, metavar="K", help="default %(default)s")
    parser.add_argument("--threads", type=positive, metavar="T", help="default: torch's choice")
    parser.add_argument(
        "--memory_gb", type=float, metavar="GB", help="tables of a comparison (default 70%% of the memory)"
    )
    parser.add_argument("--base", metavar="REF", help="compare recemb of this checkout with that of a commit")
    parser.add_argument(
        "--tests", nargs="+", metavar="PATH", help="must pass first (default tests/kernels tests/optim)"
    )
    add_output(parser, "CSV and plot")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; its exit code."""
    return run_program(build_parser(), argv, _run)


def _run(args: argparse.Namespace) -> int:
    one_off = [name for name in _ONE_OFF if getattr(args, name) is not None]
    if one_off and args.preset:
        raise ConfigError(f"--preset {args.preset} fixes --{one_off[0]}; leave one of them out")

    preset = "custom" if one_off else args.preset or "targets"
    if args.threads:
        # Read as torch loads, here and in every child.
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.base:
        # Threads that spin after a step would take the cores from the other process's turn.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    from bench.guard import TESTS, require_green

    sources = require_green(args.tests or TESTS)
    # After the tests: torch takes seconds to load.
    from bench.report import Report, run_base, run_comparisons
    from bench.settings import METHODS, PATHS, PRESETS, RANKS, grid

    if one_off:
        axes = {name: getattr(args, name) for name in _FIELDS if getattr(args, name) is not None}
        if "rows" in axes:
            axes["rows"] = [(rows,) for rows in axes["rows"]]
        comparisons = grid(axes, args.methods or METHODS, args.ranks or RANKS, args.paths or PATHS)
    else:
        comparisons = PRESETS[preset]()
    # A one-off run must not replace the results that git keeps.
    default = None if one_off else RESULTS
    if args.base:
        report = Report(args.output, default, f"ops_{preset}_base", sources)
        return run_base(comparisons, args.base, args.rounds, args.memory_gb, report)
    report = Report(args.output, default, f"ops_{preset}", sources)
    return run_comparisons(comparisons, args.rounds, args.memory_gb, report, with_scale=preset == "targets")


if __name__ == "__main__":
    sys.exit(main())
