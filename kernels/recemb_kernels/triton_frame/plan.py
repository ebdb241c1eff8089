"""The distinct rows of a batch on the device, without the host ever learning how many there are.

Every size below is a bound that the host knows: with L ids there are at most L distinct rows. Kernels are
launched for the bound, and those beyond the real number, which they read on the device, return at once. So a
step never waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Positions of one row that are summed by one program; longer rows are sums of such pieces.
PIECE = 64


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """Ids sorted by key; equal keys are one row, and rows are numbered in the order of their keys.

    L ids give U <= L rows. What belongs to no row is padding: keys ``total``, starts L.

    Attributes:
        order: [L] positions, sorted by key.
        inverse: [L] row of each position.
        row_key: [L] key of each row.
        piece_first: [L + 1] where each piece of a run starts.
        row_piece: [L + 1] first piece of each row.
        cuts: rows at which the key reaches each of the bounds asked for.
    """

    order: Tensor
    inverse: Tensor
    row_key: Tensor
    piece_first: Tensor
    row_piece: Tensor
    cuts: Tensor


@dataclass(frozen=True, eq=False)
class Runs:
    """Equal neighbours among L sorted keys, at most L runs; padding as of :class:`BatchPlan`.

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


def bags_of(offsets: Tensor, num_ids: int) -> Tensor:
    """[L]: the bag that each position lies in."""
    positions = torch.arange(num_ids, device=offsets.device)
    # right=True skips the empty bags that start at the same offset. Offsets that are refused for not running
    # from 0 to L must not lead out of bounds before the host knows.
    bag = torch.searchsorted(offsets, positions, right=True) - 1
    return bag.clamp(0, max(0, offsets.numel() - 2))


def plan_batch(keys: Tensor, bounds: Tensor) -> BatchPlan:
    """Sort a batch that is not empty.

    Args:
        keys: [L] int64; the last of ``bounds`` for a position that is skipped.
        bounds: [K] int64, rising; keys below the last are rows.
    """
    sorted_keys, order = torch.sort(keys, stable=True)
    runs = runs_of(sorted_keys, bounds)
    return BatchPlan(
        order=order,
        inverse=torch.empty_like(order).scatter_(0, order, runs.number),
        row_key=runs.key,
        piece_first=runs.piece_first,
        row_piece=runs.run_piece,
        cuts=runs.cuts,
    )


def runs_of(sorted_keys: Tensor, bounds: Tensor, *, whole: bool = False) -> Runs:
    """The runs of rising keys [L], L > 0.

    Args:
        bounds: [K] int64, rising; the last is the key of padding.
        whole: every run is one piece, because none is long.
    """
    count, device = sorted_keys.numel(), sorted_keys.device
    new = torch.ones(count, dtype=torch.bool, device=device)
    torch.ne(sorted_keys[1:], sorted_keys[:-1], out=new[1:])
    number = numbered(new)
    first = starts(number, count)
    if whole:
        piece_first, run_piece = first, torch.arange(count + 1, device=device)
    else:
        piece_of = numbered(new | (torch.arange(count, device=device) % PIECE == 0))
        piece_first, run_piece = starts(piece_of, count), _end(piece_of)[first]
    return Runs(
        number=number,
        key=torch.cat((sorted_keys, bounds[-1:]))[first[:-1]],
        first=first,
        piece_first=piece_first,
        run_piece=run_piece,
        cuts=_end(number)[torch.searchsorted(sorted_keys, bounds)],
    )


def numbered(new: Tensor) -> Tensor:
    """[..., L]: running number of each entry, which rises by one wherever ``new`` is true."""
    return torch.cumsum(new, dim=-1) - 1


def starts(numbers: Tensor, size: int) -> Tensor:
    """[size + 1]: first place in rising ``numbers`` [L] that holds 0, 1, ...; L for those that none holds."""
    return torch.searchsorted(numbers, torch.arange(size + 1, device=numbers.device))


def _end(numbers: Tensor) -> Tensor:
    """Append one more than the last."""
    return torch.cat((numbers, numbers[-1:] + 1))
