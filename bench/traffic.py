"""Bytes that one rank sends to the others: counted as they go, and as the design says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

ID_BYTES, FLOAT_BYTES = 8, 4


@dataclass
class Traffic:
    """What has been sent, by kind.

    Args:
        integers: ids, lengths and sizes.
        pooled: pooled rows and their gradients.
        reduced: gradients of replicated parameters. An all-reduce of n bytes over W ranks sends
            2 (W - 1) / W n from each, the least that any algorithm does.
    """

    integers: float = 0.0
    pooled: float = 0.0
    reduced: float = 0.0
    calls: int = field(default=0, compare=False)

    @property
    def total(self) -> float:
        return self.integers + self.pooled + self.reduced


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count the collectives that Python starts: those of the tables. DDP starts its own in C++."""
    found = Traffic()
    exchange, reduce = dist.all_to_all_single, dist.all_reduce

    def all_to_all_single(
        output: Tensor,
        input: Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        rows = len(input)
        kept = rows // world if not input_split_sizes else input_split_sizes[rank]
        sent = (rows - kept) * (input.numel() // max(1, rows)) * input.element_size()
        if input.is_floating_point():
            found.pooled += sent
        else:
            found.integers += sent
        found.calls += 1
        return exchange(output, input, output_split_sizes, input_split_sizes, group, async_op)

    def all_reduce(
        tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        world = dist.get_world_size(group)
        found.reduced += 2 * (world - 1) / world * tensor.numel() * tensor.element_size()
        found.calls += 1
        return reduce(tensor, op, group, async_op)

    with (
        patch.object(dist, "all_to_all_single", all_to_all_single),
        patch.object(dist, "all_reduce", all_reduce),
    ):
        yield found


def expected(
    rank: int, world: int, batch: int, dim: int, hots: int, places: Sequence[int | None], replicated: int
) -> Traffic:
    """What rank ``rank`` sends in a training step, one feature a table.

    Each sample's ids and bag lengths go to the ranks of its tables; pooled rows come back, their gradients go
    the way of the ids; gradients of replicated parameters are summed over the ranks.

    Args:
        batch: B, samples of each rank.
        dim: D of every table.
        hots: ids in a bag.
        places: the rank of each table, ``None`` where every rank has it.
        replicated: bytes of the replicated parameters.
    """
    own = sum(place == rank for place in places)
    others = sum(place not in (rank, None) for place in places)
    return Traffic(
        integers=others * batch * (hots + 1) * ID_BYTES,
        pooled=(own * (world - 1) + others) * batch * dim * FLOAT_BYTES,
        reduced=2 * (world - 1) / world * replicated,
    )
