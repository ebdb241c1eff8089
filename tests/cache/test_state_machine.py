"""F17: a cached table against a dict of rows and a dict of counts, step by step.

The compressed parameters are E [N, D] times a constant P = 1, which loses nothing, so training must equal
that of a plain dict of rows whatever is cached: capacity 1, capacity of the whole working set, more distinct
rows in a batch than capacity, and evictions in every step. N is small enough that every id outside has a
counter of its own, so which rows are cached, and in which slot, is foretold too.

Once in float64 by plain torch, with an optimizer outside; once in float32 by the native kernels, which take
the optimizer's step in the backward, and with rows that are hot by their gradients.
"""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

from recemb.backends.native import served_natively
from recemb.spec import HotRows, MixedDimension, TableSpec
from recemb_kernels.build import compiler
from tests.backends.cases import bags_of
from tests.cache.cases import Collection, spec

ROWS, DIM, RATE, DECAY = 12, 3, 0.25, 0.5
CAPACITIES, REFRESHES = st.sampled_from([1, 2, 5, ROWS]), st.sampled_from([1, 2, 3])
WARMUPS, POOLINGS = st.sampled_from([0, 1, 3]), st.sampled_from(["sum", "mean"])
BAGS = st.lists(st.lists(st.integers(0, ROWS - 1), max_size=5), min_size=1, max_size=4)


class CountModel:
    """Which ids are in which slot, by the rules of :class:`recemb.HotRows`."""

    def __init__(self, capacity: int, hot: HotRows) -> None:
        self.hot, self.steps, self.last = hot, 0, -1
        self.slots: list[int | None] = [None] * capacity
        self.inside: dict[int, float] = {}
        self.outside: dict[int, float] = {}

    @property
    def due(self) -> bool:
        if self.last < 0:
            return self.steps >= self.hot.first_refresh
        return self.steps - self.last >= self.hot.refresh_every

    def refresh(self) -> int:
        if len(self.slots) == ROWS:
            outside = {i: 0.0 for i in range(ROWS) if i not in self.inside}
        else:
            outside = {i: score for i, score in self.outside.items() if score > 0}
        hottest = sorted(outside, key=lambda i: (-outside[i], i))
        free = [k for k, i in enumerate(self.slots) if i is None]
        entering, rest = hottest[: len(free)], hottest[len(free) :]
        coldest = sorted(self.inside, key=lambda i: (self.inside[i], -i))
        leaving = []
        for new, old in zip(rest, coldest, strict=False):
            if outside[new] > self.inside[old]:
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
                    side[i] *= DECAY
        self.last = self.steps
        return len(leaving)

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


@dataclass(frozen=True, eq=False)
class Graph:
    """A forward, and what the model says of its backward.

    Attributes:
        loss: what goes backward.
        gradient: [N, D] of each row.
        ids: those of the batch, feature by feature.
        norms: per id, that of the gradient which reaches the row through it.
    """

    loss: Tensor
    gradient: Tensor
    ids: list[int]
    norms: list[np.float32]


class CachedTable(RuleBasedStateMachine):
    dtype = torch.float64
    rtol, atol = 1e-9, 1e-11

    @initialize(
        capacity=CAPACITIES,
        policy=st.sampled_from(["lfu", "lru"]),
        refresh_every=REFRESHES,
        warmup=WARMUPS,
        pooling=POOLINGS,
    )
    def build(self, capacity: int, policy: Any, refresh_every: int, warmup: int, pooling: Any) -> None:
        self._build(capacity, policy, refresh_every, warmup, pooling)

    def _build(self, capacity: int, policy: Any, refresh_every: int, warmup: int, pooling: Any) -> None:
        hot = HotRows(
            rows=capacity,
            policy=policy,
            refresh_every=refresh_every,
            warmup=warmup,
            decay=DECAY,
            track_every=1,
        )
        torch.manual_seed(0)
        self.pooling = pooling
        table = spec(MixedDimension(dim=DIM, cache=hot), ROWS, DIM, features=("f", "g"), pooling=pooling)
        self.collection = self._collection(table)
        backend = self.collection.backend()
        with torch.no_grad():
            backend.p.copy_(torch.eye(DIM))
        self._prepare()
        self.rows = backend.e.detach().double().clone()
        self.counts = CountModel(capacity, hot)
        self.evictions = 0
        # Graphs that have not gone backward.
        self.open: list[Graph] = []
        self.gradient: Tensor | None = None

    def _collection(self, table: TableSpec) -> Collection:
        return Collection([table]).to(self.dtype)

    def _prepare(self) -> None:
        """What is not part of a state: how parameters are trained."""
        self.collection.backend().p.requires_grad_(False)

    def _target(self, batch_size: int) -> Tensor:
        """[B, 2 D]: the gradient of the output."""
        return torch.linspace(-1, 1, batch_size * 2 * DIM, dtype=self.dtype).view(batch_size, 2 * DIM)

    def _close(self, ours: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(ours.detach().double(), expected, rtol=self.rtol, atol=self.atol)

    def _expected(self, bags: list[list[int]]) -> tuple[Tensor, Tensor]:
        """What a plain table gives [B, 2 D], and how often each row goes into each bag [bags, N]."""
        share = torch.zeros(len(bags), ROWS, dtype=torch.float64)
        for bag, ids in enumerate(bags):
            for i in ids:
                share[bag, i] += 1 / len(ids) if self.pooling == "mean" else 1
        pooled = share @ self.rows
        size = len(bags) // 2
        return torch.cat([pooled[:size], pooled[size:]], dim=1), share

    def _forward(self, bags: list[list[int]]) -> Graph:
        # Two features of one table: the same bags, in the order given and backwards.
        both = bags + bags[::-1]
        flat = [i for bag in both for i in bag]
        if torch.is_grad_enabled() and self.collection.training:
            if self.counts.due and not self.open and self.gradient is None:
                self.evictions += self.counts.refresh()
            self.counts.see(flat)
        pooled = self.collection(bags_of(flat, [len(bag) for bag in both], 2))
        expected, share = self._expected(both)
        self._close(pooled, expected)
        target = self._target(len(bags))
        direction = torch.cat([target[:, :DIM], target[:, DIM:]])
        # Of float32 numbers, rounded as the counters are.
        norms = [np.float32(norm) for norm in direction.norm(dim=1).tolist()]
        each = [
            norm / np.float32(len(bag)) if self.pooling == "mean" else norm
            for bag, norm in zip(both, norms, strict=True)
            for _ in bag
        ]
        return Graph((pooled * target).sum(), share.T @ direction.double(), flat, each)

    @rule(bags=BAGS)
    def forward(self, bags: list[list[int]]) -> None:
        if len(self.open) < 2:
            self.open.append(self._forward(bags))

    @precondition(lambda self: self.open)
    @rule()
    def backward(self) -> None:
        self._backward(self.open.pop(0))

    def _backward(self, graph: Graph) -> None:
        graph.loss.backward()
        total = graph.gradient if self.gradient is None else self.gradient + graph.gradient
        # Nothing has been accumulated where all bags were empty: an exchange of rows need not wait for that.
        self.gradient = total if bool(total.any()) else None

    @precondition(lambda self: self.open)
    @rule()
    def drop(self) -> None:
        self.open.pop()

    @precondition(lambda self: self.gradient is not None and not self.open)
    @rule(clear_before=st.booleans())
    def step(self, clear_before: bool) -> None:
        optimizer = torch.optim.SGD([p for p in self.collection.parameters() if p.requires_grad], RATE)
        optimizer.step()
        assert self.gradient is not None
        self.rows -= RATE * self.gradient
        self.gradient = None
        if not clear_before:
            optimizer.zero_grad()
            return
        # Gradients that stay until the next forward are not taken for accumulated ones; then they go.
        graph = self._forward([[0, 1, 1], [ROWS - 1]])
        optimizer.zero_grad()
        self._backward(graph)

    @rule(bags=BAGS)
    def train_step(self, bags: list[list[int]]) -> None:
        if self.open or self.gradient is not None:
            return
        self._backward(self._forward(bags))
        if self.gradient is not None:
            self.step(clear_before=False)

    @rule(bags=BAGS, inference=st.booleans())
    def evaluate(self, bags: list[list[int]], inference: bool) -> None:
        before = {name: value.clone() for name, value in self.collection.state_dict().items()}
        self.collection.eval()
        with torch.inference_mode() if inference else torch.no_grad():
            self._forward(bags)
        self.collection.train()
        for name, value in self.collection.state_dict().items():
            assert torch.equal(value, before[name]), name

    @precondition(lambda self: not self.open and self.gradient is None)
    @rule(how=st.sampled_from(["load", "copy", "assign"]))
    def save_and_load(self, how: str) -> None:
        if how == "copy":
            self.collection = copy.deepcopy(self.collection)
            self._prepare()
            return
        stream = io.BytesIO()
        torch.save(self.collection.state_dict(), stream)
        stream.seek(0)
        table = self.collection.backend().table
        fresh = self._collection(table)
        fresh.load_state_dict(torch.load(stream), assign=how == "assign")
        self.collection = fresh
        self._prepare()

    @invariant()
    def holds_what_was_foretold(self) -> None:
        if not hasattr(self, "counts"):
            return
        cache = self.collection.cache()
        assert [None if i < 0 else i for i in cache.ids.tolist()] == self.counts.slots
        for slot, i in enumerate(self.counts.slots):
            if i is not None:
                assert float(cache.scores[slot]) == self.counts.inside[i]
        assert cache.metrics().evictions == self.evictions
        self._close(self.collection.backend().to_dense(), self.rows)


class FusedTable(CachedTable):
    """Float32 and native kernels, SGD in the backward, and rows that are hot by the norms of gradients."""

    dtype = torch.float32
    # Rows of up to some hundred; what is lost or done twice is a twentieth at least.
    rtol, atol = 1e-5, 1e-4

    @initialize(capacity=CAPACITIES, refresh_every=REFRESHES, warmup=WARMUPS, pooling=POOLINGS)
    def build(self, capacity: int, refresh_every: int, warmup: int, pooling: Any) -> None:
        self._build(capacity, "importance", refresh_every, warmup, pooling)

    def _prepare(self) -> None:
        # P gets gradients that nothing steps on: the kernel makes no step where a parameter is frozen.
        backend, cache = self.collection.backend(), self.collection.cache()
        apply_optimizer_in_backward(torch.optim.SGD, [backend.e, cache.weight], {"lr": RATE})
        assert served_natively([cache, backend]) == [True, True]

    def _target(self, batch_size: int) -> Tensor:
        # One whole number for each sample and feature, whose norm no order of sums can round in two ways.
        target = torch.zeros(batch_size, 2, DIM)
        for at in range(2 * batch_size):
            target[at // 2, at % 2, at % DIM] = (1 + at % 4) * (-1) ** at
        return target.flatten(1)

    def _backward(self, graph: Graph) -> None:
        backend = self.collection.backend()
        graph.loss.backward()
        assert backend.e.grad is None
        assert self.collection.cache().weight.grad is None
        backend.p.grad = None
        self.rows -= RATE * graph.gradient
        self.counts.weigh(graph.ids, graph.norms)


# Explaining a failure takes minutes and says nothing about tensors.
PHASES = [Phase.explicit, Phase.generate, Phase.shrink]
CachedTable.TestCase.settings = settings(max_examples=60, stateful_step_count=30, phases=PHASES)
TestCachedTable = CachedTable.TestCase
FusedTable.TestCase.settings = settings(max_examples=60, stateful_step_count=30, phases=PHASES)
TestFusedTable = pytest.mark.skipif(not compiler(), reason="needs a C++ compiler")(FusedTable.TestCase)


def _run(machine: CachedTable, batches: list[list[list[int]]]) -> list[int]:
    """Evictions by the end of each step; everything is compared in each."""
    found = []
    for bags in batches:
        machine.train_step(bags)
        machine.holds_what_was_foretold()
        found.append(machine.evictions)
    return found


@pytest.mark.parametrize("table", [CachedTable, FusedTable])
class TestNamedSituations:
    """Each at least once, whatever the machines draw."""

    def _machine(self, table: type[CachedTable], capacity: int) -> CachedTable:
        if table is FusedTable and not compiler():
            pytest.skip("needs a C++ compiler")
        machine = table()
        policy = {} if table is FusedTable else {"policy": "lru"}
        machine.build(capacity=capacity, refresh_every=1, warmup=0, pooling="sum", **policy)
        return machine

    def test_capacity_of_one(self, table: type[CachedTable]) -> None:
        machine = self._machine(table, 1)
        evictions = _run(machine, [[[i, i, 5]] for i in range(8)])
        assert evictions[-1] >= 1
        assert len(machine.counts.inside) == 1

    def test_capacity_of_the_working_set(self, table: type[CachedTable]) -> None:
        machine = self._machine(table, 5)
        evictions = _run(machine, [[[0, 1, 2], [3, 4, 4]]] * 6)
        assert evictions[-1] == 0
        assert set(machine.counts.inside) == {0, 1, 2, 3, 4}

    def test_more_rows_in_a_batch_than_capacity(self, table: type[CachedTable]) -> None:
        machine = self._machine(table, 2)
        _run(machine, [[[0, 1, 2, 3], [4, 5, 6 + step % 6]] for step in range(6)])
        assert len(machine.counts.inside) == 2

    def test_evictions_in_every_step(self, table: type[CachedTable]) -> None:
        machine = self._machine(table, 2)
        # Each pair is looked up twice as often as the one before, whose rows it displaces.
        batches = [[[2 * step, 2 * step + 1] * 2**step] for step in range(6)]
        if table is CachedTable:
            batches += [[[2 * step % ROWS, 2 * step % ROWS + 1]] for step in range(6, 12)]
        evictions = _run(machine, batches)
        # Rows come in before the step after theirs; the first find free places, and none is recent at step 0.
        assert [after - before for before, after in pairwise(evictions[2:])] == [2] * (len(batches) - 3)
