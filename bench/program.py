"""What the programs of ``recemb bench`` have in common; imports nothing heavy, so that --help is instant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from recemb.errors import RecembError

RESULTS = Path(__file__).resolve().parent / "results"


def make_parser(program: str, description: str) -> argparse.ArgumentParser:
    """The parser of ``recemb bench <program>``, whose description keeps its lines."""
    return argparse.ArgumentParser(
        prog=f"recemb bench {program}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_output(parser: argparse.ArgumentParser, what: str = "CSV", where: str = "bench/results") -> None:
    """``--output``: where files go."""
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"{what} (default {where}, if writable)")


def run_program(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    body: Callable[[argparse.Namespace], int],
) -> int:
    """Run a program; the exit code is its body's, or 2 with one line on what is wrong."""
    args = parser.parse_args(argv)
    try:
        return body(args)
    except RecembError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return error.exit_code
