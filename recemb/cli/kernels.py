"""``recemb kernels``: compile the GPU kernels ahead of time and say what each needs, without a GPU."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from recemb.errors import ConfigError

if TYPE_CHECKING:
    from recemb_kernels.aot.configuration import Configuration
    from recemb_kernels.aot.report import Row

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

ARCHS = ("sm_80", "sm_90")

_DESCRIPTION = """\
Compile every shipped configuration of the GPU kernels for A100 (sm_80) and H100 (sm_90), and print what
each needs: registers, spills, shared memory, occupancy, instructions, and the least time a million look-ups
can take by the card's datasheet. No GPU is needed.
"""
_EPILOG = """\
examples:
  recemb kernels                                      two tables
  recemb kernels --arch sm_90 --kernel tt_gather      one card, one op
  recemb kernels --check                              other widths too; exit code 1 if a kernel breaks a law
  recemb kernels --write kernels/README.md            renew the tables of that file
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the verb and its flags."""
    parser = subparsers.add_parser(
        "kernels",
        help="compile the GPU kernels ahead of time: registers, spills, roofline",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--arch", nargs="+", choices=ARCHS, default=list(ARCHS), help="architectures (default both)"
    )
    parser.add_argument("--kernel", default="", metavar="TEXT", help="only kernels whose name contains TEXT")
    parser.add_argument(
        "--format", choices=("table", "json"), default="table", help="output form (default %(default)s)"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compile other widths too; exit code 1 if a kernel spills, falls below its stated occupancy, "
        "has a 32-bit address, or rounds float32",
    )
    parser.add_argument(
        "--write",
        metavar="FILE",
        help="put the tables, in Markdown, between <!-- recemb kernels --> and <!-- /recemb kernels -->",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report; exit code 0, or 1 when ``--check`` finds a problem.

    Raises:
        ConfigError: triton is missing, no kernel has the name, a kernel does not compile, or the file of
            ``--write`` has no markers.
    """
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "false", "off", "no", "n"):
        return _without_interpreter(args)
    if find_spec("triton") is None:
        raise ConfigError("triton is not installed, and it compiles the kernels: pip install 'recemb[gpu]'")
    from recemb_kernels.aot import tables

    target = Path(args.write) if args.write else None
    before = _read(target) if target else ""
    archs = list(dict.fromkeys(args.arch))
    shipped, further = _choose(args.kernel, args.check)
    rows = _report([*shipped, *further], archs)
    if args.format == "json":
        from json import dumps

        print(dumps([row.as_json() for row in rows], indent=2))
    else:
        print(tables.text(rows))
    if target is not None:
        written = tables.markdown(rows[: len(shipped) * len(archs)])
        target.write_text(tables.replace_between_markers(before, written), encoding="utf-8")
        print(f"written: {target}", file=sys.stderr)
    return _verdict(rows) if args.check else 0


def _choose(text: str, check: bool) -> tuple[list[Configuration], list[Configuration]]:
    """What is shipped, and what is checked with it, of the kernels whose name contains a text."""
    from recemb_kernels.aot import registry

    shipped = registry.shipped()
    further = registry.further() if check else []
    chosen, beside = ([c for c in each if text in c.kernel] for each in (shipped, further))
    if not chosen:
        names = (
            ", ".join(sorted({configuration.kernel for configuration in shipped})) or "none is shipped yet"
        )
        raise ConfigError(f"no kernel's name contains {text!r}; kernels: {names}")
    return chosen, beside


def _report(configurations: list[Configuration], archs: list[str]) -> list[Row]:
    from tqdm import tqdm

    from recemb_kernels.aot.compile import CompileError
    from recemb_kernels.aot.report import report

    total = len(configurations) * len(archs)
    with tqdm(
        total=total, desc="compile", unit="kernel", file=sys.stderr, disable=not sys.stderr.isatty()
    ) as bar:

        def step() -> None:
            bar.update()

        try:
            return report(configurations, archs, threads=os.cpu_count() or 1, done=step)
        except CompileError as error:
            raise ConfigError(str(error)) from error


def _verdict(rows: list[Row]) -> int:
    bad = [row for row in rows if row.problems]
    archs: dict[str, list[str]] = {}
    for row in bad:
        for problem in row.problems:
            archs.setdefault(f"{row.configuration.label}: {problem}", []).append(row.arch)
    for problem, where in archs.items():
        print(f"{problem} ({', '.join(dict.fromkeys(where))})", file=sys.stderr)
    print(f"{len(rows) - len(bad)} of {len(rows)} compiled kernels keep the laws", file=sys.stderr)
    return 1 if bad else 0


def _read(path: Path) -> str:
    from recemb_kernels.aot.tables import replace_between_markers

    try:
        text = path.read_text(encoding="utf-8")
        replace_between_markers(text, "")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--write {path}: {error}") from error
    return text


def _without_interpreter(args: argparse.Namespace) -> int:
    """The same command in a process of its own: kernels defined for the interpreter cannot be compiled."""
    words = [sys.executable, "-m", "recemb", "kernels", "--arch", *args.arch, "--format", args.format]
    words += [f"--kernel={args.kernel}"] if args.kernel else []
    words += ["--check"] if args.check else []
    words += [f"--write={args.write}"] if args.write else []
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    sys.stdout.flush()
    # Not at the top: a tenth of the time of `recemb --help`.
    import subprocess

    return subprocess.run(words, env=environment, check=False).returncode
