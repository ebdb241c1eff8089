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

import torch

from recemb.cli.kernels import ARCHS
from recemb_kernels.aot.configuration import Configuration
from recemb_kernels.aot.report import report
from recemb_kernels.triton_frame.elements import ELEMENTS, NAMES, factor
from recemb_kernels.tt_gather.triton_variants import gradient_variants, multiply_variants

_TRIED = {"multiply": multiply_variants, "slice_gradient": gradient_variants}
_DTYPES = {f"tl.{element.name}": dtype for dtype, element in ELEMENTS.items()}


def configurations(launch: dict[str, Any]) -> Iterator[Configuration]:
    """One of each number of warps and stages."""
    dtypes = {name: _DTYPES[value] for name, value in launch["constants"] if value in _DTYPES}
    constants = dict(launch["constants"]) | {name: ELEMENTS[dtype] for name, dtype in dtypes.items()}
    stored = dtypes.get("ELEMENT", torch.float32)
    if constants.get("FORWARD"):
        constants["COMPUTE"] = factor(stored)  # a GPU's; the interpreter has another of bfloat16
    made = {name: granted for name, kind, granted in launch["arguments"] if kind == "constexpr"}
    own = [(launch["num_warps"], launch["num_stages"])]
    for warps, stages in _TRIED.get(launch["name"], lambda _: own)(constants):
        yield Configuration(
            kernel=launch["name"],
            function=getattr(import_module(launch["module"]), launch["name"]),
            dtype=NAMES[stored][0],
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
