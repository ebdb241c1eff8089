"""The variants of the frame's kernels that are compiled ahead of time.

Figures a look-up are those of a bag of one id, whose row no other bag has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from recemb_kernels.aot.configuration import Configuration
from recemb_kernels.triton_frame.elements import KEYS, NAMES, as_compiled
from recemb_kernels.triton_frame.gradient_kernels import find_gradients, join_places, sum_places
from recemb_kernels.triton_frame.kernels import (
    locate,
    pool_rows,
    scatter_rows,
    segment_sum,
    update_rows,
    weight_gradients,
)
from recemb_kernels.triton_frame.launches import (
    PIECE,
    find_constants,
    join_constants,
    locate_constants,
    place_constants,
    pool_constants,
    scatter_constants,
    segment_constants,
    update_constants,
    weigh_constants,
)
from recemb_kernels.update import Kind

_TYPES = {
    **dict.fromkeys(
        ("out", "parts", "weights", "grad_out", "source", "sources", "grad", "rates", "scale"), "*fp32"
    ),
    **dict.fromkeys(("batch_size", "columns", "num_ids", "num_tables", "count", "row_programs"), "i32"),
    **dict.fromkeys(("turn", "past", "turns"), "i32"),
    **dict.fromkeys(("touched", "refused"), "*i32"),
    **dict.fromkeys(("index", "order", "inverse", "bag", "run_first", "start"), "*i32"),
}
# Rows of a table are numbered by ids.
_ADDRESSES = {**_TYPES, "sources": "*i64", "index": "*i64"}
_WIDTHS = (16, 64, 128)
# Widths that are not shipped: narrow, uneven and wide rows, whose tiles follow other rules, and one plain.
_FURTHER = (1, 4, 5, 8, 50, 192, 256, 512)
_FLOAT, _HALF = torch.float32, torch.bfloat16
# Elements of the cores' slices at D = 16 and R = 32.
_SLICES = (32, 512, 1024)
# Floating-point operations an element of one step, and its states.
_STEPS = {Kind.SGD: (2, 0), Kind.ADAGRAD: (7, 1), Kind.ROWWISE_ADAGRAD: (4, 0), Kind.ADAM: (13, 2)}


def shipped() -> list[Configuration]:
    """What is compiled ahead of time in CI."""
    found = []
    for width in _WIDTHS:
        found += [own for relative in (False, True) for own in _places(width, relative)]
        found += [
            _pool(width, None, weighted, turns) for turns in (False, True) for weighted in (False, True)
        ]
        found += [_pool(width, dtype, False) for dtype in (_FLOAT, _HALF)]
        found += [_weigh(width, dtype) for dtype in (None, _FLOAT, _HALF)]
        found.append(_segments(width, relative=False))
    # D = 32 of a train.
    found += [_pool(32, None, weighted, turns) for turns in (False, True) for weighted in (False, True)]
    found += [_weigh(32, None), *_places(32, relative=True)]
    found += [
        _sources(scaled, weighted) for scaled, weighted in ((False, False), (True, False), (True, True))
    ]
    found += [_pool(64, torch.float16, False), _pool(64, _FLOAT, True), _weigh(64, torch.float16)]
    # Nodes of trains.
    found += [_segments(width, relative=True) for width in (16, 32, 64, 128)]
    for kind in _STEPS:
        # A row of a table, and a slice of a core at R = 64.
        found += [_update(kind, width, _FLOAT, None) for width in (64, 8192)]
        found.append(_update(kind, 64, _HALF, None if kind == Kind.SGD else _HALF))
    found += [replace(c, listed=False) for c in _other_widths()]
    return [*found, *_entries()]


def further() -> list[Configuration]:
    """Other widths, which ``recemb kernels --check`` compiles too, and CI a few of them."""
    found = []
    for width in _FURTHER:
        found += [
            _pool(width, None, weighted, turns) for turns in (False, True) for weighted in (False, True)
        ]
        found += [_pool(width, dtype, True) for dtype in (_FLOAT, _HALF)]
        found += [_weigh(width, dtype) for dtype in (None, _FLOAT, _HALF)]
        found += [*_places(width, relative=True), _segments(width, relative=False)]
        found += [_update(Kind.ADAM, width, dtype, None) for dtype in (_FLOAT, torch.float16)]
    return [replace(c, listed=False) for c in found]


def _other_widths() -> Iterator[Configuration]:
    """Nodes and slices of default trains up to D = 64, at ranks 16, 32 and 64; rows up to D = 128.

    Steps of row-wise Adagrad, and the others' on slices of D = 16 and R = 32, which all but Adam's have in
    16 bits too.
    """
    for width in (16, 32, 128, 256, 512, 1024, 2048, 4096):
        yield _update(Kind.ROWWISE_ADAGRAD, width, _FLOAT, None)
    for kind in (Kind.SGD, Kind.ADAGRAD, Kind.ADAM):
        for width in _SLICES:
            yield _update(kind, width, _FLOAT, None)
    for kind in (Kind.SGD, Kind.ADAGRAD, Kind.ROWWISE_ADAGRAD):
        for dtype in (_HALF, torch.float16):
            for width in _SLICES:
                yield _update(kind, width, dtype, None if kind == Kind.SGD else dtype)


def _pool(width: int, dtype: torch.dtype | None, weighted: bool, turns: bool = False) -> Configuration:
    size, constants = 4 if dtype is None else dtype.itemsize, pool_constants(width, weighted, dtype, turns)
    return Configuration(
        kernel="frame.pool_rows",
        dtype=NAMES[dtype or _FLOAT][0],
        **as_compiled(pool_rows, constants, _ADDRESSES if dtype else _TYPES),
        flops_per_lookup=(1.0 + weighted) * width,
        bytes_per_lookup=width * (size + 4.0) + 16 + 4 * weighted,
        min_occupancy=0.5,
        note=_note(width, dtype) + ", weighted" * weighted + ", in turns" * turns,
        small=("features", "limits", "base", *(() if dtype is None else ("sources",))),
    )


def _weigh(width: int, dtype: torch.dtype | None) -> Configuration:
    size = 4 if dtype is None else dtype.itemsize
    return Configuration(
        kernel="frame.weight_gradients",
        dtype=NAMES[dtype or _FLOAT][0],
        **as_compiled(weight_gradients, weigh_constants(width, dtype), _ADDRESSES if dtype else _TYPES),
        flops_per_lookup=2.0 * width,
        bytes_per_lookup=width * (size + 4.0) + 28,
        min_occupancy=0.25,
        note=_note(width, dtype),
        small=("features", "limits", *(() if dtype is None else ("sources",))),
    )


def _sources(scaled: bool, weighted: bool) -> Configuration:
    return Configuration(
        kernel="frame.find_gradients",
        dtype="float32",
        **as_compiled(find_gradients, find_constants(scaled, weighted), _TYPES),
        flops_per_lookup=0.0 + scaled + weighted,
        bytes_per_lookup=12.0 + 20 * scaled + 4 * weighted,
        min_occupancy=0.5,
        note="weighted" if weighted else "means" if scaled else "sums",
        small=("features",),
    )


def _places(width: int, relative: bool) -> Iterator[Configuration]:
    note = f"D={width}" + ", micro-batch" * relative
    for scaled in (False, True):
        yield Configuration(
            kernel="frame.sum_places",
            dtype="float32",
            **as_compiled(sum_places, place_constants(width, scaled, relative), _TYPES),
            flops_per_lookup=(1.0 + scaled) * width,
            bytes_per_lookup=8.0 * width + 8 + 4 * scaled,
            min_occupancy=0.5,
            note=note + ", scaled" * scaled,
            small=("cuts",),
        )
    yield Configuration(
        kernel="frame.join_places",
        dtype="float32",
        **as_compiled(join_places, join_constants(width, relative), _TYPES),
        flops_per_lookup=width / PIECE,
        bytes_per_lookup=(4.0 * width + 16) / PIECE,
        min_occupancy=0.5,
        note=note,
        small=("cuts",),
    )


def _segments(width: int, relative: bool) -> Configuration:
    return Configuration(
        kernel="frame.segment_sum",
        dtype="float32",
        **as_compiled(segment_sum, segment_constants(width, relative), {**_TYPES, "first": "*i32"}),
        flops_per_lookup=float(width),
        bytes_per_lookup=8.0 * width + 4,
        min_occupancy=0.5,
        note=f"W={width}" + ", micro-batch" * relative,
        small=("cuts", "base"),
    )


def _update(kind: Kind, width: int, dtype: torch.dtype, state: torch.dtype | None) -> Configuration:
    flops, states = _STEPS[kind]
    state_bytes = 2.0 * states * width * (4 if state is None else state.itemsize)
    return Configuration(
        kernel="frame.update_rows",
        dtype=NAMES[dtype][0],
        **as_compiled(update_rows, update_constants(kind, width, dtype, state), _TYPES),
        flops_per_lookup=float(flops * width),
        bytes_per_lookup=width * (4.0 + 2 * dtype.itemsize) + state_bytes + 20,
        min_occupancy=0.5,
        note=f"{kind.name.lower().replace('_', ' ')}, W={width}",
        small=("refused", "parameters", "states", "states2", "cuts", "rates"),
    )


def _entries() -> Iterator[Configuration]:
    """Where gradients go."""
    for keys, size in KEYS:
        yield Configuration(
            kernel="frame.locate",
            dtype="float32",
            **as_compiled(locate, locate_constants(26), {**_TYPES, "key": keys}),
            flops_per_lookup=0.0,
            bytes_per_lookup=size + 20.0,
            min_occupancy=0.5,
            note=f"26 tables, {8 * size}-bit keys",
            small=("cuts", "first_key", "table_keys"),
        )
    for dtype in (_FLOAT, _HALF):
        types = {**_TYPES, "out": NAMES[dtype][1]}
        yield Configuration(
            kernel="frame.scatter_rows",
            dtype=NAMES[dtype][0],
            **as_compiled(scatter_rows, scatter_constants(64), types),
            flops_per_lookup=0.0,
            bytes_per_lookup=64 * (4.0 + dtype.itemsize) + 20,
            min_occupancy=0.5,
            note="W=64",
            small=("first", "cuts"),
        )


def _note(width: int, dtype: torch.dtype | None) -> str:
    return f"D={width}, {'computed rows' if dtype is None else 'stored rows'}"
