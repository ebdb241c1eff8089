"""What a cached table holds, by its rules: counts of ids, and a dict of rows beside plain parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from recemb.backends import build
from recemb.spec import ROBE, HotRows, TableSpec, TensorTrain


class CountModel:
    """Which ids are in which slot, by the rules of :class:`recemb.HotRows`."""

    def __init__(self, capacity: int, hot: HotRows, rows: int) -> None:
        self.hot, self.rows, self.steps, self.last = hot, rows, 0, -1
        self.tried: int | None = None
        self.slots: list[int | None] = [None] * capacity
        self.inside: dict[int, float] = {}
        self.outside: dict[int, float] = {}

    @property
    def due(self) -> bool:
        if self.last >= 0:
            return self.steps - self.last >= self.hot.refresh_every
        if self.tried is None:
            return self.steps >= self.hot.first_refresh
        waited = max(self.hot.track_every, (self.tried - self.hot.first_refresh) // 16)
        return self.steps - self.tried >= min(self.hot.refresh_every, waited)

    def refresh(self) -> tuple[list[int], list[int]]:
        """Exchange rows; the ids that leave and those that enter."""
        if len(self.slots) == self.rows:
            outside = {i: 0.0 for i in range(self.rows) if i not in self.inside}
        else:
            outside = {i: score for i, score in self.outside.items() if score > 0}
        hottest = sorted(outside, key=lambda i: (-outside[i], i))
        free = [k for k, i in enumerate(self.slots) if i is None]
        entering, rest = hottest[: len(free)], hottest[len(free) :]
        coldest = sorted(self.inside, key=lambda i: (self.inside[i], -i))
        leaving, times = [], 1 if self.hot.policy == "lru" else 2
        for new, old in zip(rest, coldest, strict=False):
            if outside[new] > times * self.inside[old]:
                entering.append(new)
                leaving.append(old)
        places = sorted([*(self.slots.index(i) for i in leaving), *free[: len(entering) - len(leaving)]])
        scores = {i: outside[i] for i in entering}
        evicted = {i: self.inside.pop(i) for i in leaving}
        for place, i in zip(places, sorted(entering), strict=True):
            self.slots[place] = i
        for i in entering:
            self.inside[i] = scores[i]
            self.outside.pop(i, None)
        if self.hot.policy != "lru":
            self.outside.update(evicted)
            for side in (self.inside, self.outside):
                for i in side:
                    side[i] *= self.hot.decay
        # Until there is something to hold, the first exchange is still to come.
        if self.last >= 0 or entering:
            self.last = self.steps
        else:
            self.tried = self.steps
        return leaving, entering

    def see(self, ids: list[int]) -> None:
        """Both features' ids, one feature's after the other's."""
        for part in (ids[: len(ids) // 2], ids[len(ids) // 2 :]):
            for side, seen in (
                (self.inside, [i for i in part if i in self.inside]),
                (self.outside, [i for i in part if i not in self.inside]),
            ):
                for place, i in enumerate(seen, 1):
                    if self.hot.policy == "lfu":
                        side[i] = side.get(i, 0.0) + 1
                    elif self.hot.policy == "lru":
                        # Rounded as the counters are.
                        time = np.float32(place) / np.float32(len(seen) + 1) + np.float32(self.steps)
                        side[i] = max(side.get(i, 0.0), float(time))
        self.steps += 1

    def weigh(self, ids: list[int], norms: list[np.float32]) -> None:
        """Sum up in float32, in the order of the batch: which of two scores is larger is then foretold."""
        for i, norm in zip(ids, norms, strict=True):
            side = self.inside if i in self.inside else self.outside
            side[i] = float(np.float32(side.get(i, 0.0)) + norm)


class RowModel:
    """A dict of the rows that are cached, and a table in float64 without a cache for the others.

    Written back rows are not foretold, but held against what the method promises; the parameters are then
    taken as they are.

    Args:
        table: the table.
        parameters: its own, at the start.
        rtol: how far what is written may be from what was promised.
        atol: the same of a number near 0.
    """

    def __init__(self, table: TableSpec, parameters: Mapping[str, Tensor], rtol: float, atol: float) -> None:
        plain = replace(table, compression=replace(table.compression, cache=None))
        self.plain = build([plain], torch.device("cpu"))[table.name].double()
        self.slots = self.plain.map_ids(torch.arange(table.num_embeddings))
        self.rtol, self.atol = rtol, atol
        self.cached: dict[int, Tensor] = {}
        # Squared norms of what rows that left lacked after their write-back, and would have lacked without.
        self.lost = [0.0, 0.0]
        self._take(parameters)

    def _take(self, parameters: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, own in self.plain.own_parameters().items():
                own.copy_(parameters[name])

    def stored(self) -> Tensor:
        """[N, D] as the parameters say."""
        return self.plain.rows(self.slots)

    def rows(self) -> Tensor:
        """[N, D] as looked up."""
        rows = self.stored().detach()
        for i, row in self.cached.items():
            rows[i] = row
        return rows

    def step(self, gradient: Tensor, rate: float, trained: Iterable[str]) -> None:
        """One of SGD, by the gradient [N, D] of the rows; a cached one's goes to no parameter."""
        outside = gradient.clone()
        for i, row in self.cached.items():
            outside[i] = 0
            row -= rate * gradient[i]
        own = self.plain.own_parameters()
        parameters = [own[name] for name in trained]
        grads = torch.autograd.grad((self.stored() * outside).sum(), parameters)
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter -= rate * grad

    def exchange(
        self,
        leaving: Sequence[int],
        entering: Sequence[int],
        cost: float,
        was: Mapping[str, Tensor],
        now: Mapping[str, Tensor],
    ) -> None:
        """Rows leave and others enter.

        Args:
            leaving: ids.
            entering: ids.
            cost: of a change of another row, in write-backs.
            was: the parameters before.
            now: and after.
        """
        ids = torch.tensor(leaving, dtype=torch.int64)
        # What the rows that leave are not made of keeps its bits. Weights of their own: no two cancel.
        left = self.stored()[ids].flatten()
        parameters = self.plain.own_parameters()
        parts = torch.autograd.grad(left @ torch.linspace(1, 2, len(left)).double(), [*parameters.values()])
        for name, part in zip(parameters, parts, strict=True):
            kept = (part == 0) | (name not in self.plain.written_parameters())
            assert torch.equal(was[name][kept], now[name][kept]), name
        if leaving:
            values = torch.stack([self.cached.pop(i) for i in leaving])
            self._write_back(ids, values, cost, now)
        rows = self.stored().detach()
        self.cached.update({i: rows[i].clone() for i in entering})

    def _write_back(self, ids: Tensor, values: Tensor, cost: float, now: Mapping[str, Tensor]) -> None:
        """Take what has been written, held against law 9 of :mod:`recemb.backends.base`."""
        before = self.stored().detach()
        compression = self.plain.table.compression
        array = self._spread(ids, values, cost) if isinstance(compression, ROBE) else None
        self._take(now)
        rows = self.stored()
        after, without = (float((each[ids] - values).square().sum()) for each in (rows.detach(), before))
        self.lost = [self.lost[0] + after, self.lost[1] + without]
        scale = float(values.square().sum() + before.square().sum())
        slack = self.rtol * (1 + scale)
        assert without - after > 0 or without <= slack
        if array is not None:
            torch.testing.assert_close(now["array"].double(), array, rtol=self.rtol, atol=self.atol)
            return
        others = torch.ones(len(before), dtype=torch.bool)
        others[ids] = False
        change = cost * (rows - before)[others].square().sum()
        if isinstance(compression, TensorTrain):
            # Each core's step keeps the law, so the squares of their changes add up to as many gains at most.
            assert change.item() <= compression.num_cores * (without - after) + slack
            return
        # The least squares are met: no other parameters among those written would cost less.
        written = [self.plain.own_parameters()[name] for name in self.plain.written_parameters()]
        for slope in torch.autograd.grad((rows[ids] - values).square().sum() + change, written):
            assert float(slope.abs().max()) <= self.rtol * (1 + scale**0.5)

    def _spread(self, ids: Tensor, values: Tensor, cost: float) -> Tensor:
        """The array after each weight has moved by what the elements of ``ids`` that read it ask for."""
        array = self.plain.own_parameters()["array"]
        rows, old = self.stored()[ids], array.detach().clone()
        (asked,) = torch.autograd.grad((rows * (values - rows.detach())).sum(), array)
        with torch.no_grad():
            array.fill_(1)
        signs = self.stored()[ids]
        (reading,) = torch.autograd.grad((signs * signs.detach()).sum(), array)
        load = self.plain.table.dense_numel / array.numel()
        return old + asked / (reading + cost * (load - reading).clamp(min=0))
