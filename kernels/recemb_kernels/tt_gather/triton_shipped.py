"""The tensor-train kernels that are compiled ahead of time in CI."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from recemb_kernels.aot.configuration import Configuration
from recemb_kernels.triton_frame.elements import ELEMENTS, NAMES, as_compiled
from recemb_kernels.triton_frame.launches import PIECE
from recemb_kernels.tt_gather import TrainShape
from recemb_kernels.tt_gather.triton_children import join_children, sum_children
from recemb_kernels.tt_gather.triton_kernel import (
    add_slices,
    copy_slices,
    count_nodes,
    find_groups,
    group_bounds,
    mark_touched,
    multiply,
    place_nodes,
    slice_gradient,
    split_digits,
)
from recemb_kernels.tt_gather.triton_variants import (
    BACK,
    LONG,
    SHORT,
    children_constants,
    count_constants,
    digit_constants,
    find_constants,
    gradient_constants,
    gradient_variants,
    group_constants,
    join_constants,
    multiply_constants,
    multiply_variants,
    node_constants,
    product_of,
    slice_block,
    touched_constants,
)

_RANKS = (16, 32, 64)
# The splits of D = 16, 32 and 64 into two to four, and of 128 into three, that recemb's default takes, and at
# which of these ranks; and TT-Rec's (2, 2, 4). The README's table shows the first.
_LISTED = (
    ((1, 1, 16), _RANKS),
    *(((2, 1, 16), (16,)), ((1, 1, 32), (32, 64))),
    *(((4, 1, 16), (16,)), ((2, 1, 32), (32,)), ((1, 1, 64), (64,))),
    ((2, 2, 4), _RANKS),
)
_UNLISTED = (
    *(((4, 4), _RANKS), ((4, 8), _RANKS), ((8, 8), _RANKS)),
    ((1, 1, 1, 16), _RANKS),
    *(((2, 1, 1, 16), (16,)), ((1, 1, 1, 32), (32, 64))),
    *(((4, 1, 1, 16), (16,)), ((2, 1, 1, 32), (32,)), ((1, 1, 1, 64), (64,))),
    *(((8, 1, 16), (16,)), ((4, 1, 32), (32,)), ((2, 1, 64), (64,))),
)
# Stated occupancies of products, by warps and stages, and of those with eight warps. Registers bound them, as
# a product's total and the tiles of its factors live there: at 80 a thread there is room for three blocks of
# eight warps, which load tiles ahead of the dots. Of plain products each warp more repeats the addresses of
# all rows, and of exact ones with a transpose four warps were faster than eight (kernels/README.md, "A step
# of 65,536 samples"): so few warps take more registers, up to 128 a thread, a single one up to 168.
_LEAST, _LEAST_OF_EIGHT = {SHORT: 0.18, LONG: 0.25, BACK: 0.25}, 0.37
_INDEX = "*i64"
_NUMBER = "*i32"
_PLAN = {
    "nodes": _NUMBER,
    "parent": _NUMBER,
    "group_first": _INDEX,
    "tile_first": _INDEX,
    "tile_group": _NUMBER,
}
_DESCRIPTORS = ("cores", "entry_table", "entry_row", "source_base", "out_base")


def shipped() -> list[Configuration]:
    """What is compiled ahead of time in CI. A look-up is a distinct row that shares no prefix: most work.

    What several shapes launch with equal constants stands once, under the first of them.
    """
    few, some, most = _shape((4, 1, 4), 4), _shape((1, 1, 16), 32), _shape((1, 1, 128), 128)
    found = []
    for shape in (few, *_shapes(_LISTED), most):
        found += _of_dtypes(shape)
    # float16 differs from bfloat16 in nothing but the name of an instruction.
    found += of_shape(some, torch.float16)
    for shape in (some, most):
        found += _rounded(shape)
    for order in (3, 2, 4):
        found += _nodes(order)
    for shape in _shapes(_UNLISTED):
        found += [replace(c, listed=False) for c in _of_dtypes(shape)]
    # Fewer warps than they are given would not do.
    for shape in (_shape((2, 2, 4, 4), 24), _shape((2, 2, 2, 2), 4), _shape((8, 16), 24)):
        own = [c for c in of_shape(shape, torch.float32) if "back" in c.note or "children" in c.kernel]
        found += [replace(c, listed=False) for c in own]
    long = [c for c in of_shape(_shape((1, 3), 128), torch.float32) if c.kernel == "tt_gather.multiply"]
    found += [replace(c, listed=False) for c in long]
    once: dict[tuple[object, ...], Configuration] = {}
    for c in found:
        values = (repr(dict(part)) for part in (c.signature, c.constants))
        once.setdefault((c.kernel, c.dtype, c.num_warps, c.num_stages, *values), c)
    return list(once.values())


def _of_dtypes(shape: TrainShape) -> list[Configuration]:
    return [c for dtype in (torch.float32, torch.bfloat16) for c in of_shape(shape, dtype)]


def _shapes(splits: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[TrainShape]:
    return [_shape(split, rank) for split, ranks in splits for rank in ranks]


def _shape(split: tuple[int, ...], rank: int) -> TrainShape:
    """A shape whose bonds all have one rank; no constant depends on its rows."""
    order = len(split)
    return TrainShape((220,) * order, split, (1, *[rank] * (order - 1), 1))


def _rounded(shape: TrainShape) -> Iterator[Configuration]:
    """The products of float32 tables for a user who has allowed torch to round them to TF32."""
    every: dict[str, Configuration] = {}
    for c in of_shape(shape, torch.float32):
        if c.constants.get("DOT"):
            every.setdefault(f"{c.kernel} {c.note}", c)
    for c in every.values():
        constants = {**c.constants, "PRECISION": "tf32"}
        of_kernel = multiply_variants if "FORWARD" in constants else gradient_variants
        for warps, stages in of_kernel(constants):
            own = replace(c, constants=constants, num_warps=warps, num_stages=stages)
            least = _LEAST_OF_EIGHT if c.kernel == "tt_gather.multiply" else c.min_occupancy
            yield replace(own, note=f"{c.note}, TF32", rounds=True, min_occupancy=least)


def of_shape(shape: TrainShape, dtype: torch.dtype) -> Iterator[Configuration]:
    """Everything that a table of this shape launches but for the kernels that make a batch's tree."""
    size, name, element = dtype.itemsize, NAMES[dtype][0], NAMES[dtype][1]
    note = f"R={shape.ranks[1]}, q=({','.join(map(str, shape.dim_shape))})"
    last = len(shape.dim_shape) - 1
    for k in range(1, last + 1):
        q, inner, outer = product_of(shape, k)
        for forward in (True, False) if k < last or shape.stores_shares else (True,):
            constants = multiply_constants(shape, k, dtype, forward)
            source, out = (size, 4 if k == last else size) if forward else (4, 4)
            types = {4: "*fp32", 2: element}
            way = "" if forward else ", back"
            for warps, stages in multiply_variants(constants):
                yield Configuration(
                    kernel="tt_gather.multiply",
                    function=multiply,
                    dtype=name,
                    signature={
                        "out": types[out],
                        "source": types[source],
                        "cores": _INDEX,
                        **_PLAN,
                        **dict.fromkeys(("entry_table", "entry_row", "source_base", "out_base"), _INDEX),
                        "num_entries": "i32",
                        "part": "i32",
                    },
                    constants=constants,
                    num_warps=warps,
                    num_stages=stages,
                    flops_per_lookup=2.0 * q * inner * outer,
                    bytes_per_lookup=q * (constants["K"] * source + constants["N"] * out) + 16.0,
                    min_occupancy=_LEAST.get((warps, stages), _LEAST_OF_EIGHT),
                    note=f"{note}, core {k + 1}{way}",
                    small=_DESCRIPTORS,
                )
        constants = gradient_constants(shape, k, dtype)
        for warps, stages in gradient_variants(constants):
            yield Configuration(
                kernel="tt_gather.slice_gradient",
                function=slice_gradient,
                dtype=name,
                signature={
                    "grad": "*fp32",
                    "source": element,
                    "grad_out": "*fp32",
                    **{name: _PLAN[name] for name in ("nodes", "parent", "group_first")},
                    **dict.fromkeys(("source_base", "grad_base"), _INDEX),
                    "num_entries": "i32",
                    "part": "i32",
                },
                constants=constants,
                num_warps=warps,
                num_stages=stages,
                flops_per_lookup=2.0 * q * inner * outer,
                bytes_per_lookup=q * (inner * size + outer * 4.0) + 16,
                min_occupancy=0.5,
                note=f"{note}, core {k + 1}",
                small=("source_base", "grad_base"),
            )
    yield from _children(shape, dtype, note)
    yield from _slices(shape, dtype, note)


def _children(shape: TrainShape, dtype: torch.dtype, note: str) -> Iterator[Configuration]:
    """The kernels that come back from rows."""
    constants = children_constants(shape, dtype)
    types = {
        **dict.fromkeys(("out", "parts", "source"), "*fp32"),
        **dict.fromkeys(("child", "parent", "entry"), _NUMBER),
    }
    q, k, n = product_of(shape, len(shape.dim_shape) - 1)
    stored = constants["SHARES"]
    # Shares that are computed take a slice for each row.
    computed_bytes = 4.0 * q * (n + k) + k * n * dtype.itemsize + 12
    if dtype is torch.float32:
        yield Configuration(
            kernel="tt_gather.join_children",
            dtype=NAMES[dtype][0],
            **as_compiled(join_children, join_constants(shape), types),
            flops_per_lookup=q * k / PIECE,
            bytes_per_lookup=(4.0 * q * k + 12) / PIECE,
            min_occupancy=0.5,
            note=note,
            small=("cuts",),
        )
    yield Configuration(
        kernel="tt_gather.sum_children",
        dtype=NAMES[dtype][0],
        **as_compiled(sum_children, constants, types),
        flops_per_lookup=q * k * (1.0 if stored else 2.0 * n),
        bytes_per_lookup=4.0 * q * k * 2 + 8 if stored else computed_bytes,
        min_occupancy=0.5,
        note=note,
        small=("cores", "entry_table", "entry_row", "cuts", "node_cuts"),
    )


def _slices(shape: TrainShape, dtype: torch.dtype, note: str) -> Iterator[Configuration]:
    """The kernels that move slices of the first core, and the one that finds a row's slices."""
    width = shape.dim_shape[0] * shape.ranks[1]
    name, element = NAMES[dtype]
    block = slice_block(width)
    common: dict[str, Any] = {"num_warps": block["num_warps"], "num_stages": 3, "dtype": name, "note": note}
    yield Configuration(
        kernel="tt_gather.copy_slices",
        function=copy_slices,
        signature={
            "out": element,
            **dict.fromkeys(("cores", "entry_table", "entry_row", "cuts"), _INDEX),
            "digit": _NUMBER,
            "parts": "i32",
        },
        constants={"W": width, "ELEMENT": ELEMENTS[dtype], "BW": block["BW"]},
        flops_per_lookup=0.0,
        bytes_per_lookup=2.0 * width * dtype.itemsize + 8,
        min_occupancy=0.5,
        small=("cores", "entry_table", "entry_row", "cuts"),
        **common,
    )
    if dtype is torch.float32:
        yield Configuration(
            kernel="tt_gather.add_slices",
            function=add_slices,
            signature={
                "grad": "*fp32",
                "touched": "*i32",
                "source": "*fp32",
                "digit": _NUMBER,
                "cuts": _INDEX,
                "parts": "i32",
            },
            constants={"W": width, "BW": block["BW"]},
            flops_per_lookup=float(width),
            bytes_per_lookup=8.0 * width + 8,
            min_occupancy=0.5,
            small=("cuts",),
            **common,
        )


def _nodes(order: int) -> Iterator[Configuration]:
    """The kernels that make a batch's tree, of 26 tables and 4,096 samples."""
    count, groups = 26 * 4096, 26 * 250
    types = {
        **dict.fromkeys(("num_tables", "count", "part_rows", "micro_batch_rows", "blocks"), "i32"),
        **dict.fromkeys(("num_parts", "num_micro_batches", "num_groups", "num_entries", "wide"), "i32"),
        **dict.fromkeys(("counts", "keys", "group_key", "touched"), _NUMBER),
        **dict.fromkeys(("row_key", "digits", "last", "entry", "parent", "child", "group"), _NUMBER),
        "new": "*i8",
    }
    digits = 4.0 * order + order - 1
    wide = {"row_key": _INDEX}
    for kernel, constants, nbytes, other in (
        (split_digits, digit_constants(order, 26), 4.0 + digits, {}),
        (split_digits, digit_constants(order, 26), 8.0 + digits, wide),
        (count_nodes, count_constants(order), order - 1.0, {}),
        (place_nodes, node_constants(order), 2 * digits + 12.0 * (order - 1), {}),
        (group_bounds, group_constants(count), 4.0, {}),
        (find_groups, find_constants(groups), 8.0, {}),
        (mark_touched, touched_constants(), 4.0, {}),
    ):
        compiled = as_compiled(kernel, constants, {**types, **other})
        small = (
            *("cuts", "first_key", "table_keys", "radices", "entry_base", "counts", "node_cuts", "slices"),
            *("first", "tiles", "tile_first", "touched", "group_first", "prefixes"),
        )
        yield Configuration(
            kernel=f"tt_gather.{kernel.__name__}",
            dtype="float32",
            **compiled,
            flops_per_lookup=0.0,
            bytes_per_lookup=nbytes,
            min_occupancy=0.5,
            note=f"26 tables, d={order}" + ", 64-bit keys" * bool(other),
            small=tuple(name for name in small if name in compiled["signature"]),
        )
