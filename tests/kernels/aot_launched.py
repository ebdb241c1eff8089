"""Compiles the launches that it is given, each exactly as Triton would for that launch.

A program of its own, for a process that does not interpret Triton. It reads a JSON list of what
``tests.kernels.triton.launch_keys.Launch`` has, and prints how many it compiled, products with all the warps
and stages that are tried at first, and a line for each that spills registers, or rounds float32 unasked.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import triton.language as tl

from recemb.cli.kernels import ARCHS
from recemb_kernels.aot.configuration import Configuration
from recemb_kernels.aot.report import report
from recemb_kernels.tt_gather.triton_variants import gradient_variants, multiply_variants

_TRIED = {"multiply": multiply_variants, "slice_gradient": gradient_variants}
_STAGES = 3  # Triton's choice
_DTYPES = {"tl.fp32": "float32", "tl.bf16": "bfloat16", "tl.fp16": "float16"}


def configurations(launch: dict[str, Any]) -> Iterator[Configuration]:
    """One of each number of warps and stages."""
    of_type = {name: value for name, value in launch["constants"] if value in _DTYPES}
    constants = {
        name: tl.dtype(value.removeprefix("tl.")) if name in of_type else value
        for name, value in launch["constants"]
    }
    if constants.get("FORWARD") and constants["ELEMENT"] == tl.bfloat16:
        constants["COMPUTE"] = tl.bfloat16  # which the interpreter has in float32
    made = {name: granted for name, kind, granted in launch["arguments"] if kind == "constexpr"}
    own = [(launch["num_warps"], launch["num_stages"] or _STAGES)]
    for warps, stages in _TRIED.get(launch["name"], lambda _: own)(constants):
        yield Configuration(
            kernel=launch["name"],
            function=getattr(import_module(launch["module"]), launch["name"]),
            dtype=_DTYPES[of_type.get("ELEMENT", "tl.fp32")],
            signature={name: kind for name, kind, _ in launch["arguments"] if name not in made},
            constants={**constants, **made},
            num_warps=warps,
            num_stages=stages,
            flops_per_lookup=0.0,
            bytes_per_lookup=1.0,
            min_occupancy=0.01,
            note=str(launch["constants"]),
            rounds=constants.get("PRECISION") == "tf32",
            aligned=tuple(name for name, _, granted in launch["arguments"] if granted == "D"),
        )


def main() -> None:
    given = [c for launch in json.load(sys.stdin) for c in configurations(launch)]
    rows = report(given, ARCHS, threads=os.cpu_count() or 1)
    # Their offsets are checked of what is shipped, which says whose arrays are small.
    broken = [
        f"{row.configuration.label}, {row.arch}: {problem}"
        for row in rows
        for problem in row.problems
        if problem not in row.narrow
    ]
    print(json.dumps({"compiled": len(given), "broken": broken}))


if __name__ == "__main__":
    main()
