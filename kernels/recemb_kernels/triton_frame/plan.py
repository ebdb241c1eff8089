"""The distinct rows of a batch on the device, without the host ever learning how many there are.

Every size below is a bound that the host knows: with L ids there are at most L distinct rows. Kernels are
launched for the bound, and those beyond the real number, which they read on the device, return at once. So a
step never waits for the device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recemb_kernels.triton_frame.elements import cdiv
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


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """Ids sorted by key; equal keys are one row, and rows are numbered in the order of their keys.

    L ids give U <= L rows. What belongs to no row is padding: keys ``total``, starts L. Numbers of positions
    and rows are int32, as a batch has fewer than 2**31 positions.

    Attributes:
        order: [L] positions, sorted by key.
        inverse: [L] row of each position.
        row_key: [L] key of each row, in the type of the batch's keys.
        first: [L + 1] the place in ``order`` where each row's positions start.
        cuts: rows at which the key reaches each of the bounds asked for, int64.
    """

    order: Tensor
    inverse: Tensor
    row_key: Tensor
    first: Tensor
    cuts: Tensor


@dataclass(frozen=True, eq=False)
class Runs:
    """Equal neighbours among L sorted keys, at most L runs; padding as of :class:`BatchPlan`.

    Numbers are int32, or int64 of 2**31 keys and more, which blocks of rows may be.

    Attributes:
        number: [L] run of each place.
        key: [L] key of each run.
        first: [L + 1] where each run starts.
        piece_first: [L + 1] where each piece of a run starts.
        run_piece: [L + 1] first piece of each run.
        cuts: runs at which the key reaches each of the bounds asked for.
    """

    number: Tensor
    key: Tensor
    first: Tensor
    piece_first: Tensor
    run_piece: Tensor
    cuts: Tensor


@dataclass(frozen=True, eq=False)
class Keys:
    """How ids become keys that are distinct over all tables; on the device.

    Attributes:
        base: [F] what each feature adds to its ids.
        rows: [F] ids at or above this, or below 0, are skipped.
        bounds: [families + 1] first key of each family, and one past the last: the key of what is skipped.
        narrow: whether all keys fit in 32 bits, which sort in half the time.
    """

    base: Tensor
    rows: Tensor
    bounds: Tensor
    narrow: bool


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which may be another GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def check(ids: Tensor, offsets: Tensor, weights: Tensor | None, rows: Tensor, batch_size: int) -> Tensor:
    """[1] int32 on the device: not 0 when a batch is malformed.

    Args:
        ids: [L] int64.
        offsets: [F * B + 1] int64, which should rise from 0 to L.
        weights: [L], which should be finite, or ``None``.
        rows: [F] int64, the rows of each feature's table, which ids should not reach.
        batch_size: B.
    """
    refused = torch.zeros(1, dtype=torch.int32, device=ids.device)
    bags, count = offsets.numel() - 1, ids.numel()
    constants = check_constants(bags, weights is not None)
    with on_device(ids.device):
        check_batch[(cdiv(max(bags, count) + 1, constants["BL"]),)](
            refused,
            ids,
            offsets,
            offsets if weights is None else weights,
            rows,
            max(1, batch_size),
            bags,
            count,
            **constants,
        )
    return refused


def infinite(values: Tensor) -> Tensor:
    """[1] int32 on the device: not 0 when one of ``values``, contiguous float32, is NaN or infinite."""
    mark = torch.zeros(1, dtype=torch.int32, device=values.device)
    constants = mark_constants()
    if values.numel():
        mark_infinite[(cdiv(values.numel(), constants["BL"]),)](mark, values, values.numel(), **constants)
    return mark


def keys_of(ids: Tensor, offsets: Tensor, keys: Keys, batch_size: int) -> tuple[Tensor, Tensor]:
    """The key, int32 where that will do, and the bag, int32, of each position; [L] each, L > 0."""
    count, bags = ids.numel(), offsets.numel() - 1
    key = torch.empty(count, dtype=torch.int32 if keys.narrow else torch.int64, device=ids.device)
    bag = torch.empty(count, dtype=torch.int32, device=ids.device)
    constants = key_constants(bags)
    place_ids[(cdiv(count, constants["BL"]),)](
        key,
        bag,
        ids,
        offsets,
        keys.base,
        keys.rows,
        keys.bounds[-1:],
        max(1, batch_size),
        bags,
        count,
        **constants,
    )
    return key, bag


def plan_batch(keys: Tensor, bounds: Tensor) -> BatchPlan:
    """Sort a batch that is not empty.

    Args:
        keys: [L] int32 or int64; the last of ``bounds`` for a position that is skipped.
        bounds: [K] int64, rising; keys below the last are rows.
    """
    sorted_keys, order = torch.sort(keys, stable=True)
    places = order.to(torch.int32)
    del order
    inverse, first = (_numbers(keys, len(keys) + more) for more in (0, 1))
    row_key, cuts = torch.empty_like(sorted_keys), torch.empty_like(bounds)
    arrays = inverse, inverse, row_key, first, first, first, cuts
    _number(arrays, sorted_keys, bounds, run_constants(True, True), places)
    return BatchPlan(order=places, inverse=inverse, row_key=row_key, first=first, cuts=cuts)


def runs_of(sorted_keys: Tensor, bounds: Tensor, *, whole: bool = False) -> Runs:
    """The runs of rising keys [L], L > 0.

    Args:
        bounds: [K] int64, rising; the last is the key of padding.
        whole: every run is one piece, because none is long.
    """
    number, key = _numbers(sorted_keys, len(sorted_keys)), torch.empty_like(sorted_keys)
    first, run_piece = (_numbers(sorted_keys, len(sorted_keys) + 1) for _ in range(2))
    piece_first = first if whole else torch.empty_like(first)
    cuts = torch.empty_like(bounds)
    arrays = number, number, key, first, piece_first, run_piece, cuts
    _number(arrays, sorted_keys, bounds, run_constants(whole, False), number)
    return Runs(number=number, key=key, first=first, piece_first=piece_first, run_piece=run_piece, cuts=cuts)


def _numbers(keys: Tensor, count: int) -> Tensor:
    """Memory for so many numbers of places, of which there are as many as keys."""
    kind = torch.int32 if len(keys) < 2**31 else torch.int64
    return torch.empty(count, dtype=kind, device=keys.device)


def _number(
    arrays: tuple[Tensor, ...], keys: Tensor, bounds: Tensor, constants: dict[str, Any], order: Tensor
) -> None:
    """Fill the arrays of ``number_runs``, in its order."""
    count = keys.numel()
    blocks = cdiv(count + 1, constants["BL"])
    counts = torch.empty(2 * blocks, dtype=torch.int32, device=keys.device)
    count_runs[(blocks,)](
        counts, keys, count, **{name: constants[name] for name in ("PIECE", "BL", "num_warps")}
    )
    number_runs[(blocks,)](*arrays, counts, keys, order, bounds, bounds.numel(), count, blocks, **constants)
