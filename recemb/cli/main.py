"""The ``recemb`` command: reads the verb and its flags, runs it, turns errors into exit codes.

Exit codes: 0 done, 1 a check failed or a rank was lost, 2 bad configuration or usage, 3 bad data, 4 a plan or
a batch that does not fit, 5 non-finite training, 75 interrupted. Only errors that a user can cause and mend
(:mod:`recemb.errors`) become a message; anything else is a defect of recemb and keeps its traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NoReturn

from recemb import __version__
from recemb.cli import bench, doctor, kernels, plan, prepare, report, train
from recemb.errors import RecembError

VERBS = (prepare, train, plan, report, bench, kernels, doctor)

_DESCRIPTION = "Train DLRM-style recommenders with embedding tables 10 to 1000 times smaller."
_EPILOG = """\
first steps:
  recemb prepare --dataset_name synthetic --output data/synthetic
  recemb train --data_dir data/synthetic --method tt --compress_rate 100 --compare dense --output runs/tt
  recemb report runs/tt --output runs/tt/report
"""


class _Parser(argparse.ArgumentParser):
    """argparse, with a suggestion for a misspelt verb, flag or choice."""

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            hint = did_you_mean(str(value), choices) or f"; choose from {', '.join(choices)}"
            raise argparse.ArgumentError(action, f"invalid choice: {str(value)!r}{hint}")


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the candidate nearest to ``word``, or an empty string."""
    import difflib

    near = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command; each verb file adds its own part."""
    parser = _Parser(
        prog="recemb",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"recemb {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb in VERBS:
        verb.add_parser(subparsers)
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        verb_parser = _verb_parser(parser, args.verb)
        flags = [option for action in verb_parser._actions for option in action.option_strings]
        problems = [
            f"unknown argument {word}" + did_you_mean(word.split("=")[0], flags)
            for word in unknown
            if word.startswith("-")
        ] or [f"unknown argument {word}" for word in unknown]
        verb_parser.error("\n  ".join(problems))
    return args


def _verb_parser(parser: argparse.ArgumentParser, verb: str) -> argparse.ArgumentParser:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found: argparse.ArgumentParser = action.choices[verb]
            return found
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one ``recemb`` command line and return its exit code.

    Args:
        argv: the words after ``recemb``; the process's own when ``None``.
    """
    try:
        args = _parse(sys.argv[1:] if argv is None else argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    try:
        verb = next(module for module in VERBS if module.__name__.endswith(f".{args.verb}"))
        code: int = verb.run(args)
        return code
    except RecembError as error:
        print(f"recemb {args.verb}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"recemb {args.verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe (head, less) has gone; python would complain once more when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def entry_point() -> NoReturn:
    """What the installed ``recemb`` script calls."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(main())
    code = 1
    try:
        code = main()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    # Threads of a process group may outlive it, as where a rank stops alone or before its backward. What they
    # let go of while the interpreter ends aborts the process, exit code and all (pytorch #179291).
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
