"""``recemb doctor``: what is installed, which kernels are active, what is missing and how to repair it."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recemb.training.diagnosis import Finding

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Add the verb and its flags."""
    parser = subparsers.add_parser(
        "doctor",
        help="say what is installed, which kernels are active, what is missing",
        description="Check the installation. Exit code 0 when a training run would work, 2 when not.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--format", choices=("table", "json"), default="table", help="output form (default %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the findings."""
    from dataclasses import asdict
    from json import dumps

    from recemb.training.diagnosis import examine

    findings = examine()
    if args.format == "json":
        print(dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print(_table(findings))
    return 2 if any(finding.status == "missing" for finding in findings) else 0


def _table(findings: list[Finding]) -> str:
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.name:<{width}}  {finding.status:<7}  {finding.value}")
        if finding.repair:
            lines.append(f"{'':<{width}}  {'':<7}  repair: {finding.repair}")
    missing = [finding.name for finding in findings if finding.status == "missing"]
    verdict = f"a training run would fail: {', '.join(missing)}" if missing else "a training run would work"
    return "\n".join([*lines, "", verdict, f"python: {sys.executable}"])
