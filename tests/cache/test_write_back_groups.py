"""A train's write-back goes from group to group of slices: what it holds at once, and that it is alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recemb.backends import tt_write_back
from recemb.backends.tt_write_back import write_rows
from recemb.id_maps.radix import mixed_radix

ROWS, DIMS = (12, 20, 15), (2, 2, 4)


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within it, views of those given not."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._held: dict[int, Any] = {tensor.untyped_storage()._cdata: tensor for tensor in given}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._held:
                self._hold(tensor.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)

        def let_go(_: object) -> None:
            del self._held[key]
            self.now -= size

        self._held[key] = ref(storage, let_go)


def train(rank: int) -> list[Tensor]:
    ranks = (1, *(rank for _ in ROWS[1:]), 1)
    shapes = zip(ROWS, ranks[:-1], DIMS, ranks[1:], strict=True)
    return [torch.randn(shape) / rank**0.5 for shape in shapes]


def rows_of(cores: Sequence[Tensor], digits: Tensor) -> Tensor:
    """[E, D]"""
    slices = [core[digit] for core, digit in zip(cores, digits.T, strict=True)]
    return torch.einsum("eaib,ebjc,eckd->eijk", *slices).flatten(1)


@pytest.mark.parametrize("leaving", [1000, 3000])
def test_what_is_held_at_once_is_bounded(leaving: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    room, cores = 2**17, train(rank=16)
    monkeypatch.setattr(tt_write_back, "_GATHERED", room)
    digits = mixed_radix(torch.randperm(math.prod(ROWS))[:leaving], ROWS)
    values = torch.randn(leaving, math.prod(DIMS))
    with Live([*cores, digits, values]) as live:
        write_rows(cores, digits, values, cost=0.05)
    assert live.now == 0
    # What the rows lack, in double, and their order; cores, and what comes of contracting each with itself.
    beside = 8 * leaving * (values.shape[1] + 4) + 8 * 3 * sum(core.numel() for core in cores)
    assert room * 8 / 2 < live.most <= room * 8 + beside


# How many slices are solved for at once: all, those of as many rows, one.
@pytest.mark.parametrize(("room", "uneven"), [(2**30, 1), (1, 4)], ids=["of a size", "one"])
@pytest.mark.parametrize("cost", [0.05, 1.0])
def test_slices_are_solved_for_alike_in_any_groups(
    cost: float, room: int, uneven: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    cores = train(rank=4)
    # Of the middle digits 0 .. 19, more rows have the lower ones.
    first, middle, last = torch.rand(3, 200)
    digits = torch.stack([first * ROWS[0], middle**3 * ROWS[1], last * ROWS[2]], dim=1).long().unique(dim=0)
    start = rows_of(cores, digits)
    values = start + torch.randn_like(start)
    found = []
    for sizes in ((2**30, 10**9), (room, uneven)):
        for name, size in zip(("_GATHERED", "_UNEVEN"), sizes, strict=True):
            monkeypatch.setattr(tt_write_back, name, size)
        counts = [len(list(tt_write_back._groups(cores, digits, k))) for k in range(3)]
        assert min(counts) > 2 if found else counts == [1, 1, 1]
        own = [core.clone() for core in cores]
        write_rows(own, digits, values, cost)
        found.append(own)
    assert (rows_of(found[0], digits) - values).norm() < 0.99 * (start - values).norm()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
