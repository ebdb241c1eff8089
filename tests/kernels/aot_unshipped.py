"""Compiles a seeded few of what is not shipped: rows of other widths, and trains of other shapes.

A program of its own, for a process that does not interpret Triton: see ``test_aot_shipped.py``. It prints how
many configurations it compiled, and a line for each law that one breaks.
"""

from __future__ import annotations

import json
import os
import random
from itertools import product

import torch

from recemb.backends.tt_shapes import tt_shapes
from recemb.cli.kernels import ARCHS
from recemb.spec import TensorTrain
from recemb_kernels.aot.configuration import Configuration
from recemb_kernels.aot.registry import further
from recemb_kernels.aot.report import report
from recemb_kernels.tt_gather import TrainShape
from recemb_kernels.tt_gather.triton_shipped import of_shape, shipped

SEED, TRAINS = 136, 12


def rows(draw: random.Random) -> list[Configuration]:
    """Of each kernel of rows, one of each kind of widths that has a rule of its own."""
    kinds: dict[tuple[str, bool, bool, bool, bool], list[Configuration]] = {}
    for c in further():
        width = c.constants["D"] if "D" in c.constants else c.constants["W"]
        kind = width <= 4, width % 4 != 0, width > 128, bool(c.constants.get("TURNS"))
        kinds.setdefault((c.kernel, *kind), []).append(c)
    return [draw.choice(of_kind) for of_kind in kinds.values()]


def trains(draw: random.Random, number: int) -> list[Configuration]:
    """One configuration of each of some unshipped shapes that recemb chooses for D = 8-256 and R = 4-128."""
    known = {_launch(c) for c in shipped()}
    methods = product(
        (2, 3, 4), (8, 16, 32, 48, 64, 96, 128, 192, 256), (4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
    )
    found: dict[TrainShape, None] = {}
    for num_cores, dim, rank in methods:
        method = TensorTrain(rank=rank, num_cores=num_cores)
        for split in {tt_shapes(rows, dim, method)[1] for rows in (1000, 100_000, 10_000_000)}:
            found[TrainShape((220,) * num_cores, split, (1, *[rank] * (num_cores - 1), 1))] = None
    chosen: list[Configuration] = []
    shapes = sorted(found, key=lambda shape: (shape.dim_shape, shape.ranks))
    for shape in draw.sample(shapes, len(shapes)):
        dtype = draw.choice((torch.float32, torch.bfloat16, torch.float16))
        if own := [c for c in of_shape(shape, dtype) if _launch(c) not in known]:
            chosen.append(draw.choice(own))
    return chosen[:number]


def _launch(c: Configuration) -> tuple[object, ...]:
    return c.kernel, c.num_warps, c.num_stages, repr(dict(c.signature)), repr(dict(c.constants))


def main() -> None:
    draw = random.Random(SEED)
    chosen = [*rows(draw), *trains(draw, TRAINS)]
    found = report(chosen, ARCHS, threads=os.cpu_count() or 1)
    broken = [
        f"{row.configuration.label}, {row.arch}: {problem}" for row in found for problem in row.problems
    ]
    print(json.dumps({"compiled": len(chosen), "broken": broken}))


if __name__ == "__main__":
    main()
