"""Which rank writes which part of a state.

Every rank offers the pieces that it holds. A piece that several ranks hold, as of a replicated tensor, is
written by the one with the least to write so far; memory that has several keys (the array of a ROBE group,
tied weights) is written once. The result depends on the offers alone, so each rank finds it for itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recemb.checkpoint.boxes import Box, untiled, whole
from recemb.checkpoint.tree import DTYPES, FlatState
from recemb.errors import CheckpointError


@dataclass(frozen=True)
class Placed:
    """A piece, the rank that writes it, and its name in that rank's file."""

    box: Box
    rank: int
    name: str


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor and the pieces that hold each of its elements once."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Placed, ...]


def offer(flat: FlatState) -> dict[str, Any]:
    """What this rank holds, as JSON for :func:`place`."""
    known: dict[Any, int] = {}
    return {
        key: {
            "dtype": entry.dtype,
            "shape": entry.shape,
            # Equal numbers are the same memory.
            "pieces": [
                [piece.offsets, piece.sizes, known.setdefault(piece.storage, len(known))]
                for piece in entry.pieces
            ],
        }
        for key, entry in flat.tensors.items()
    }


def place(offers: Sequence[Mapping[str, Any]]) -> dict[str, PlacedTensor]:
    """Give each piece a rank that writes it.

    Args:
        offers: of each rank, from :func:`offer`. A rank may lack a tensor that another holds.

    Raises:
        CheckpointError: ranks disagree about a tensor, or their shards do not add up to it; names it.
    """
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    holders: dict[str, dict[Box, list[tuple[int, int]]]] = {}
    for rank, offered in enumerate(offers):
        for key, held in offered.items():
            kind = held["dtype"], tuple(held["shape"])
            if kinds.setdefault(key, kind) != kind:
                raise CheckpointError(
                    f"{key}: is {kind[0]} of shape {kind[1]} on rank {rank} and {kinds[key][0]} of shape "
                    f"{kinds[key][1]} on another; a tensor that each rank has its own of needs its own key"
                )
            for offsets, sizes, memory in held["pieces"]:
                boxes = holders.setdefault(key, {})
                boxes.setdefault(Box(tuple(offsets), tuple(sizes)), []).append((rank, memory))
    for key, (_, shape) in kinds.items():
        wrong = untiled(shape, list(holders.get(key, {})))
        if wrong is not None:
            raise CheckpointError(f"{key}: {wrong}; the ranks' shards do not make up the tensor")
    chosen = _choose(kinds, holders, len(offers))
    return {
        key: PlacedTensor(
            dtype, shape, tuple(Placed(box, *chosen[key, box]) for box in sorted(holders.get(key, {})))
        )
        for key, (dtype, shape) in sorted(kinds.items())
    }


def _choose(
    kinds: Mapping[str, tuple[str, tuple[int, ...]]],
    holders: Mapping[str, Mapping[Box, Sequence[tuple[int, int]]]],
    num_ranks: int,
) -> dict[tuple[str, Box], tuple[int, str]]:
    load = [0] * num_ranks
    names = {"__metadata__"}
    written: dict[tuple[int, int], str] = {}
    chosen: dict[tuple[str, Box], tuple[int, str]] = {}
    sized = [
        (box.numel * DTYPES[kinds[key][0]].itemsize, key, box)
        for key, held in holders.items()
        for box in held
    ]
    # The biggest first, which spreads bytes most evenly.
    for num_bytes, key, box in sorted(sized, key=lambda item: (-item[0], item[1], item[2])):
        held = holders[key][box]
        again = [holder for holder in held if holder in written]
        rank, memory = again[0] if again else min(held, key=lambda holder: (load[holder[0]], holder[0]))
        if not again:
            name = key if box == whole(kinds[key][1]) else f"{key}{box}"
            # A tensor may be called as another's shard would be, or as the file's own entry.
            while name in names or (name != key and name in kinds):
                name += "#"
            names.add(name)
            written[rank, memory] = name
            load[rank] += num_bytes
        chosen[key, box] = rank, written[rank, memory]
    return chosen
