"""Boxes of a tensor (offsets and sizes in each dimension): overlaps, and whether they tile it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Of one tensor; a check of all pairs takes a second for so many.
MAX_BOXES = 2**14


@dataclass(frozen=True, order=True)
class Box:
    """The elements [offset, offset + size) in each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def overlap(self, other: Box) -> Box | None:
        """The elements in both, in the coordinates of the tensor; ``None`` when there is none."""
        starts = tuple(map(max, self.offsets, other.offsets))
        sizes = tuple(
            min(own + size, theirs + width) - start
            for own, size, theirs, width, start in zip(
                self.offsets, self.sizes, other.offsets, other.sizes, starts, strict=True
            )
        )
        return Box(starts, sizes) if all(size > 0 for size in sizes) else None

    def inside(self, outer: Box) -> tuple[slice, ...]:
        """Where this box is in a tensor that holds the box ``outer``."""
        return tuple(
            slice(own - origin, own - origin + size)
            for own, origin, size in zip(self.offsets, outer.offsets, self.sizes, strict=True)
        )

    def __str__(self) -> str:
        spans = (f"{start}:{start + size}" for start, size in zip(self.offsets, self.sizes, strict=True))
        return f"[{','.join(spans)}]"


def whole(shape: Sequence[int]) -> Box:
    """The box of all elements."""
    return Box((0,) * len(shape), tuple(shape))


def untiled(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """What is wrong when ``boxes``, none of them empty, are to hold each element of the tensor once."""
    if len(boxes) > MAX_BOXES:
        return f"it has {len(boxes)} shards, more than {MAX_BOXES}"
    for box in boxes:
        if len(box.offsets) != len(shape) or len(box.sizes) != len(shape):
            return f"shard {box} has another number of dimensions than {tuple(shape)}"
        ends = zip(box.offsets, box.sizes, shape, strict=True)
        if any(start < 0 or size < 1 or start + size > extent for start, size, extent in ends):
            return f"shard {box} is not inside {tuple(shape)}"
    if sum(box.numel for box in boxes) != math.prod(shape):
        return f"its shards hold {sum(box.numel for box in boxes)} of {math.prod(shape)} elements"
    starts = np.array([box.offsets for box in boxes], dtype=np.int64).reshape(len(boxes), len(shape))
    stops = starts + np.array([box.sizes for box in boxes], dtype=np.int64).reshape(starts.shape)
    for at in range(len(boxes) - 1):
        later = slice(at + 1, None)
        meets = (starts[later] < stops[at]) & (starts[at] < stops[later])
        both = np.flatnonzero(meets.all(axis=1))
        if len(both):
            return f"shards {boxes[at]} and {boxes[at + 1 + int(both[0])]} overlap"
    return None
