"""Bytes that one rank sends to the others: counted, slowed down to a link's speed, and as the design says."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
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


@dataclass
class _Sent:
    """One exchange: its bytes from this rank to the others and back, of what kind, and what starts it."""

    kind: str
    size: float
    received: float
    start: Callable[[], Any]


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count the collectives that Python starts: those of the tables. DDP starts its own in C++."""
    found = Traffic()

    def count(sent: _Sent) -> Any:
        setattr(found, sent.kind, getattr(found, sent.kind) + sent.size)
        found.calls += 1
        return sent.start()

    with _exchanges(count):
        yield found


@contextmanager
def linked(gbits: float) -> Iterator[None]:
    """Let the tables' exchanges take as long as over a link of ``gbits`` Gbit/s from each rank, one by one.

    An exchange is over once the link has been free for what the rank sends or receives, whichever is more;
    meanwhile the rank computes, or sleeps when it has to wait. The real exchange takes place too.
    """
    free = 0.0

    def travel(sent: _Sent) -> Any:
        nonlocal free
        work = sent.start()
        free = max(free, time.perf_counter()) + max(sent.size, sent.received) / (gbits * 1e9 / 8)
        travelling = _Travelling(work, free)
        if work is None:
            travelling.wait()
            return None
        return travelling

    with _exchanges(travel):
        yield


class _Travelling(dist.Work):
    """An exchange that is not there before ``at``. torchrec waits for what is a ``Work`` alone."""

    def __init__(self, work: Any, at: float) -> None:
        super().__init__()
        self._work, self._at = work, at

    def wait(self, *arguments: Any) -> Any:
        done = None if self._work is None else self._work.wait(*arguments)
        time.sleep(max(0.0, self._at - time.perf_counter()))
        return done


@contextmanager
def _exchanges(run: Callable[[_Sent], Any]) -> Iterator[None]:
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
        sent, received = (
            (len(rows) - (sizes[rank] if sizes else len(rows) // world))
            * (rows.numel() // max(1, len(rows)))
            * rows.element_size()
            for rows, sizes in ((input, input_split_sizes), (output, output_split_sizes))
        )
        start = partial(exchange, output, input, output_split_sizes, input_split_sizes, group, async_op)
        return run(_Sent("pooled" if input.is_floating_point() else "integers", sent, received, start))

    def all_reduce(
        tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        world = dist.get_world_size(group)
        sent = 2 * (world - 1) / world * tensor.numel() * tensor.element_size()
        return run(_Sent("reduced", sent, sent, partial(reduce, tensor, op, group, async_op)))

    with (
        patch.object(dist, "all_to_all_single", all_to_all_single),
        patch.object(dist, "all_reduce", all_reduce),
    ):
        yield


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
