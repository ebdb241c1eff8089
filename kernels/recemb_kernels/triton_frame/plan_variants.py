"""The variants of the planning kernels that are compiled ahead of time, for 26 features and 4,096 samples.

Figures a look-up are those of a bag of one id, whose row no other bag has.
"""

from __future__ import annotations

from typing import Any

from recemb_kernels.aot.configuration import Configuration
from recemb_kernels.triton_frame.elements import KEYS, as_compiled
from recemb_kernels.triton_frame.launches import (
    check_constants,
    key_constants,
    mark_constants,
    run_constants,
)
from recemb_kernels.triton_frame.plan_kernels import (
    check_batch,
    count_runs,
    mark_infinite,
    number_runs,
    place_ids,
)

_BAGS = 26 * 4096
_TYPES = {
    **dict.fromkeys(("batch_size", "num_bags", "count", "num_bounds", "blocks"), "i32"),
    **dict.fromkeys(("refused", "mark", "counts"), "*i32"),
    **dict.fromkeys(("bag", "order", "number", "inverse", "first", "piece_first", "run_piece"), "*i32"),
    **dict.fromkeys(("weights", "values"), "*fp32"),
}


def shipped() -> list[Configuration]:
    """What is compiled ahead of time in CI."""
    found = [
        _of(check_batch, check_constants(_BAGS, weighted), 16.0 + 4 * weighted, "weighted" * weighted)
        for weighted in (False, True)
    ]
    found.append(_of(mark_infinite, mark_constants(), 64.0, "D=16"))
    for keys, size in KEYS:
        note = f"{8 * size}-bit keys"
        counted = {name: value for name, value in run_constants(False, False).items() if name in _COUNTED}
        found.append(_of(place_ids, key_constants(_BAGS), 12.0 + size, note, keys))
        found.append(_of(count_runs, counted, float(size), note, keys))
        for whole, inverse in ((True, True), (False, False), (True, False)):
            kind = note + (", by position" if inverse else ", whole" * whole)
            moved = 2.0 * size + 4.0 * (3 + (not whole))
            found.append(_of(number_runs, run_constants(whole, inverse), moved, kind, keys))
    return found


_COUNTED = ("PIECE", "BL", "num_warps")


def _of(
    kernel: Any, constants: dict[str, Any], nbytes: float, note: str, keys: str = "*i64"
) -> Configuration:
    compiled = as_compiled(kernel, constants, {**_TYPES, "keys": keys, "run_key": keys})
    small = ("refused", "mark", "rows", "base", "nothing", "cuts", "bounds", "counts")
    return Configuration(
        kernel=f"frame.{kernel.__name__}",
        dtype="float32",
        **compiled,
        flops_per_lookup=0.0,
        bytes_per_lookup=nbytes,
        min_occupancy=0.5,
        note=note,
        small=tuple(name for name in small if name in compiled["signature"]),
    )
