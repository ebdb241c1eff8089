"""F17: a cached table against a dict of rows and a dict of counts, step by step.

Whatever is cached, training must equal that of a dict of the cached rows beside plain parameters for the
rest: capacity 1, capacity of the whole working set, more distinct rows in a batch than capacity, and
evictions in every step. What a row becomes that leaves is the method's promise. N is small enough that every
id outside has a counter of its own, so which rows are cached, and in which slot, is foretold too.

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
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

from recemb.backends.native import served_natively
from recemb.bags import Bags
from recemb.cache.refresh import write_back_cost
from recemb.spec import ROBE, HotRows, MixedDimension, TableSpec, TensorTrain
from recemb_kernels.build import compiler
from tests.backends.cases import bags_of
from tests.cache import cases
from tests.cache.cases import Collection, spec
from tests.cache.models import CountModel, RowModel

ROWS, DIM, DECAY = 12, 4, 0.5
# Most often such that rows leave in many steps.
CAPACITIES, REFRESHES = st.sampled_from([1, 2, 2, 5, ROWS]), st.sampled_from([1, 1, 1, 2, 3])
WARMUPS, POOLINGS = st.sampled_from([0, 0, 1, 3]), st.sampled_from(["sum", "mean"])
BAGS = st.lists(st.lists(st.integers(0, ROWS - 1), max_size=5), min_size=1, max_size=4)


METHODS: dict[str, Any] = {
    **cases.METHODS,
    # Loses nothing: E [N, D] times P = 1.
    "identity": lambda cache: MixedDimension(dim=DIM, cache=cache),
    "tt": lambda cache: TensorTrain(rank=2, row_shape=(3, 2, 3), dim_shape=(1, 2, 2), cache=cache),
    "robe": lambda cache: ROBE(compress_rate=3, block_size=2, use_sign=True, cache=cache),
}
# One for each of the kernels that a cached table's rows come from, which take long to compile.
FUSED = ("identity", "tt", "mult", "robe")
# Products of parameters: a step changes what another's gradient is.
PRODUCTS = ("tt", "mult")


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
    method = "identity"
    dtype = torch.float64
    rtol, atol = 1e-9, 1e-11

    @initialize(
        capacity=CAPACITIES,
        policy=st.sampled_from(["lfu", "lru"]),
        refresh_every=REFRESHES,
        warmup=WARMUPS,
        pooling=POOLINGS,
    )
    def build(self, pooling: Any, **hot: Any) -> None:
        self._build(pooling, **hot)

    def _build(self, pooling: Any, capacity: int, **settings: Any) -> None:
        hot = HotRows(rows=capacity, decay=DECAY, track_every=1, **settings)
        torch.manual_seed(0)
        self.pooling = pooling
        table = spec(METHODS[self.method](hot), ROWS, DIM, features=("f", "g"), pooling=pooling)
        self.collection = self._collection(table)
        backend = self.collection.backend()
        self.trained = list(backend.own_parameters())
        # Products of parameters would grow large within some steps of the rate below.
        self.rate = 2**-8
        if self.method == "identity":
            self.trained, self.rate = ["e"], 2**-2
            with torch.no_grad():
                backend.p.copy_(torch.eye(DIM))
        self._prepare()
        self.rows = RowModel(table, backend.own_parameters(), self.rtol, self.atol)
        self.counts = CountModel(capacity, hot, ROWS)
        self.evictions = 0
        # Graphs that have not gone backward.
        self.open: list[Graph] = []
        self.gradient: Tensor | None = None

    def _collection(self, table: TableSpec) -> Collection:
        return Collection([table]).to(self.dtype)

    def _prepare(self) -> None:
        """What is not part of a state: how parameters are trained."""
        for name, parameter in self.collection.backend().own_parameters().items():
            parameter.requires_grad_(name in self.trained)

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
        pooled = share @ self.rows.rows()
        size = len(bags) // 2
        return torch.cat([pooled[:size], pooled[size:]], dim=1), share

    def _forward(self, bags: list[list[int]]) -> Graph:
        # Two features of one table: the same bags, in the order given and backwards.
        both = bags + bags[::-1]
        flat = [i for bag in both for i in bag]
        batch = bags_of(flat, [len(bag) for bag in both], 2)
        training = torch.is_grad_enabled() and self.collection.training
        if training and self.counts.due and not self.open and self.gradient is None:
            pooled = self._exchange(batch)
        else:
            pooled = self.collection(batch)
        if training:
            self.counts.see(flat)
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

    def _exchange(self, batch: Bags) -> Tensor:
        """A forward that rows are exchanged before."""
        own, cache = self.collection.backend().own_parameters(), self.collection.cache()
        leaving, entering = self.counts.refresh()
        was = {name: parameter.detach().clone() for name, parameter in own.items()}
        pooled: Tensor = self.collection(batch)
        self.rows.exchange(leaving, entering, write_back_cost(cache, len(leaving)), was, own)
        self.evictions += len(leaving)
        return pooled

    @rule(bags=BAGS)
    def forward(self, bags: list[list[int]]) -> None:
        if len(self.open) < self._most_open():
            self.open.append(self._forward(bags))

    def _most_open(self) -> int:
        return 2

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
        optimizer = torch.optim.SGD([p for p in self.collection.parameters() if p.requires_grad], self.rate)
        optimizer.step()
        assert self.gradient is not None
        self.rows.step(self.gradient, self.rate, self.trained)
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

    @rule(place=st.integers(0, ROWS - 1), times=st.integers(8, 24))
    def crowd(self, place: int, times: int) -> None:
        """An id outside is looked up so often that it is likely to take another one's place."""
        outside = [i for i in range(ROWS) if i not in self.counts.inside] or [0]
        self.train_step([[outside[place % len(outside)]] * times])

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
        before = self.collection.state_dict()
        if how == "copy":
            self.collection = copy.deepcopy(self.collection)
        else:
            stream = io.BytesIO()
            torch.save(before, stream)
            stream.seek(0)
            self.collection = self._collection(self.collection.backend().table)
            self.collection.load_state_dict(torch.load(stream), assign=how == "assign")
        self._prepare()
        for name, value in self.collection.state_dict().items():
            assert torch.equal(value, before[name]), name

    @invariant()
    def holds_what_was_foretold(self) -> None:
        if not hasattr(self, "counts"):
            return
        cache = self.collection.cache()
        assert [None if i < 0 else i for i in cache.ids.tolist()] == self.counts.slots
        for slot, i in enumerate(self.counts.slots):
            if i is not None:
                assert float(cache.scores[slot]) == self.counts.inside[i]
        if self.counts.hot.policy != "lru":
            votes = dict(zip(cache.owners[:-1].tolist(), cache.votes[:-1].tolist(), strict=True))
            assert {i: vote for i, vote in votes.items() if vote} == {
                i: score for i, score in self.counts.outside.items() if score
            }
        assert cache.metrics().evictions == self.evictions
        lost = torch.tensor(self.rows.lost, dtype=torch.float64)
        # Counted in float32.
        torch.testing.assert_close(cache.errors.double(), lost, rtol=1e-4, atol=self.atol)
        backend = self.collection.backend()
        self._close(backend.compressed_rows(torch.arange(ROWS)), self.rows.stored().detach())
        self._close(backend.to_dense(), self.rows.rows())


class FusedTable(CachedTable):
    """Float32 and native kernels, SGD in the backward, and rows that are hot by the norms of gradients."""

    dtype = torch.float32
    # Rows of up to some hundred, where what is lost or done twice is a twentieth at least; or of some ones,
    # at a rate 64 times lower.
    rtol, atol = 1e-5, 1e-4

    @initialize(capacity=CAPACITIES, refresh_every=REFRESHES, warmup=WARMUPS, pooling=POOLINGS)
    def build(self, pooling: Any, **hot: Any) -> None:
        self._build(pooling, policy="importance", **hot)

    def _prepare(self) -> None:
        # P = 1 gets gradients that nothing steps on: the kernel makes no step where a parameter is frozen.
        backend, cache = self.collection.backend(), self.collection.cache()
        stepped = [*(backend.own_parameters()[name] for name in self.trained), cache.weight]
        apply_optimizer_in_backward(torch.optim.SGD, stepped, {"lr": self.rate})
        assert served_natively([cache, backend]) == [True, True]

    def _most_open(self) -> int:
        return 1 if self.method in PRODUCTS else 2

    def _target(self, batch_size: int) -> Tensor:
        # One whole number for each sample and feature, whose norm no order of sums can round in two ways.
        target = torch.zeros(batch_size, 2, DIM)
        for at in range(2 * batch_size):
            target[at // 2, at % 2, at % DIM] = (1 + at % 4) * (-1) ** at
        return target.flatten(1)

    def _backward(self, graph: Graph) -> None:
        graph.loss.backward()
        for name, parameter in self.collection.backend().own_parameters().items():
            assert parameter.grad is None or name not in self.trained
            parameter.grad = None
        assert self.collection.cache().weight.grad is None
        self.rows.step(graph.gradient, self.rate, self.trained)
        self.counts.weigh(graph.ids, graph.norms)


CASES = [*((CachedTable, method) for method in METHODS), *((FusedTable, method) for method in FUSED)]


def _machine(table: type[CachedTable], method: str) -> type[CachedTable]:
    if table is FusedTable and not compiler():
        pytest.skip("needs a C++ compiler")
    return type(f"{table.__name__}_{method}", (table,), {"method": method})


@pytest.mark.parametrize(("table", "method"), CASES)
def test_any_steps(table: type[CachedTable], method: str) -> None:
    # Explaining a failure takes minutes and says nothing about tensors.
    phases = [Phase.explicit, Phase.generate, Phase.shrink]
    examples = 16 if method == "identity" else 6
    run_state_machine_as_test(
        _machine(table, method),
        settings=settings(max_examples=examples, stateful_step_count=30, phases=phases),
    )


def _run(machine: CachedTable, batches: list[list[list[int]]]) -> list[int]:
    """Evictions by the end of each step; everything is compared in each."""
    found = []
    for bags in batches:
        machine.train_step(bags)
        machine.holds_what_was_foretold()
        found.append(machine.evictions)
    return found


@pytest.mark.parametrize(("table", "method"), CASES)
class TestNamedSituations:
    """Each at least once, whatever the machines draw."""

    def _machine(self, table: type[CachedTable], method: str, capacity: int) -> CachedTable:
        machine = _machine(table, method)()
        policy = {} if table is FusedTable else {"policy": "lru"}
        machine.build(capacity=capacity, refresh_every=1, warmup=0, pooling="sum", **policy)
        return machine

    def test_capacity_of_one(self, table: type[CachedTable], method: str) -> None:
        machine = self._machine(table, method, 1)
        evictions = _run(machine, [[[i, i, 5]] for i in range(8)])
        assert evictions[-1] >= 1
        assert len(machine.counts.inside) == 1

    def test_capacity_of_the_working_set(self, table: type[CachedTable], method: str) -> None:
        machine = self._machine(table, method, 5)
        evictions = _run(machine, [[[0, 1, 2], [3, 4, 4]]] * 6)
        assert evictions[-1] == 0
        assert set(machine.counts.inside) == {0, 1, 2, 3, 4}

    def test_more_rows_in_a_batch_than_capacity(self, table: type[CachedTable], method: str) -> None:
        machine = self._machine(table, method, 2)
        _run(machine, [[[0, 1, 2, 3], [4, 5, 6 + step % 6]] for step in range(6)])
        assert len(machine.counts.inside) == 2

    def test_evictions_in_every_step(self, table: type[CachedTable], method: str) -> None:
        machine = self._machine(table, method, 2)
        # Each pair is looked up twice as often as the one before, whose rows it displaces.
        batches = [[[2 * step, 2 * step + 1] * 2**step] for step in range(6)]
        if table is CachedTable:
            batches += [[[2 * step % ROWS, 2 * step % ROWS + 1]] for step in range(6, 12)]
        evictions = _run(machine, batches)
        # Rows come in before the step after theirs; the first find free places, and none is recent at step 0.
        assert [after - before for before, after in pairwise(evictions[2:])] == [2] * (len(batches) - 3)
