"""``recemb bench``: speed against fbgemm, torch and other peers, measured by the programs of a checkout."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import recemb
from recemb.errors import ConfigError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

PROGRAMS = ("ops", "train", "cache", "micro_batches", "scaling", "gpu")

_DESCRIPTION = """\
Measure speed as ratios of one run. The programs live in bench/ of a checkout of recemb:

  ops     one look-up, ours and the peers' (recemb bench ops --help)
  train   a whole DLRM training step with compressed and with uncompressed tables (recemb bench train --help)
  cache   hit rate, step time and AUC against the size of a hot-row cache (recemb bench cache --help)
  gpu     one look-up on a GPU, as a share of its roofline (recemb bench gpu --help)
  scaling a sharded DLRM step on one and more processes, and what they send (recemb bench scaling --help)
  micro_batches   memory and time of slices of a batch (recemb bench micro_batches --help)
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the verb; everything after the program's name is the program's own."""
    parser = subparsers.add_parser(
        "bench",
        help="measure speed against fbgemm, torch and other peers",
        usage=f"recemb bench {{{','.join(PROGRAMS)}}} [flags]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("program", choices=PROGRAMS, help="what to measure")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="of the program; --help lists them")


def run(args: argparse.Namespace) -> int:
    """Run the program from the checkout; its exit code.

    Raises:
        ConfigError: recemb is installed without its benchmarks.
    """
    root = Path(str(recemb.__file__)).resolve().parents[1]
    if not (root / "bench" / f"{args.program}.py").is_file():
        raise ConfigError(
            f"the benchmarks are not part of an installed recemb ({root} has no bench/{args.program}.py); "
            "run it in a checkout after pip install -e ."
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        code: int = import_module(f"bench.{args.program}").main(args.flags)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return code
