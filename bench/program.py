"""What the programs of ``recemb bench`` have in common; imports nothing heavy, so that --help is instant."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

from recemb.errors import ConfigError, RecembError

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


def positive(text: str) -> int:
    """A flag's whole number from 1."""
    if not text.lstrip("-").isdigit():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number")
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be >= 1")
    return value


def row_scale(text: str) -> Fraction:
    """``--scale``: a share of the rows, as 1/100 or 0.01."""
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text} is not a fraction; e.g. 1/100") from None
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must lie in (0, 1]")
    return value


def rate(text: str) -> float:
    """``--compress_rate``: a number from 1."""
    value = _number(text)
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number >= 1, e.g. 100")
    return value


def speed(text: str) -> float:
    """``--link_gbits``: a positive number."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a positive number, e.g. 10 or 0.5")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a number") from None


def run_program(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    body: Callable[[argparse.Namespace], int],
) -> int:
    """Run a program; the exit code is its body's, or the error's with one line on what is wrong."""
    args = parser.parse_args(argv)
    try:
        return body(args)
    except RecembError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return error.exit_code


def require_gpu(instead: str) -> None:
    """Raise :class:`ConfigError`, which says what to do ``instead``, where torch sees no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(f"torch sees no GPU here; {instead}")
