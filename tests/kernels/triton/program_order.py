"""The interpreter's programs in an order that nobody knows, as a GPU's are."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from triton.runtime.interpreter import InterpreterBuilder


@contextmanager
def shuffled_programs(seed: int = 0) -> Iterator[None]:
    """The programs of each launch within run in a random order; the interpreter's own is their numbers'.

    One still ends before the next one begins: what two of them add to one number comes in another order, and
    what one reads that another one writes may come too late.
    """
    generator = random.Random(seed)
    set_sizes, set_program = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx
    order: list[int] = []

    def shuffle(builder: Any, *sizes: int) -> None:
        order[:] = generator.sample(range(count := math.prod(sizes)), count)
        set_sizes(builder, *sizes)

    def run_another(builder: Any, x: int, y: int, z: int) -> None:
        _, rows, columns = builder.grid_dim
        program, z = divmod(order[(x * rows + y) * columns + z], columns)
        set_program(builder, *divmod(program, rows), z)

    with (
        patch.object(InterpreterBuilder, "set_grid_dim", shuffle),
        patch.object(InterpreterBuilder, "set_grid_idx", run_another),
    ):
        yield
