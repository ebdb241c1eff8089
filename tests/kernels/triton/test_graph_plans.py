"""Batches that a graph prepares ahead of the graph that looks them up: the same bits, whatever comes between.

With the stand-ins of ``graph_cases.py``; ``tests/gpu`` has real graphs and streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from threading import Thread
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from recemb.bags import Bags
from recemb_kernels.digit_tree.group import Batch
from recemb_kernels.triton_frame import graphs
from recemb_kernels.triton_frame.family import Call
from recemb_kernels.triton_frame.graph_plans import Planned, PlannedAhead
from recemb_kernels.triton_frame.graphs import GraphedGroup
from recemb_kernels.triton_frame.streams import copied, tensors_of
from tests.kernels.triton.graph_cases import (
    FakeRecorder,
    Model,
    StubGroup,
    StubRecorder,
    at_once,
    gradient,
    graphed,
)
from tests.kernels.triton.graph_scripts import SCRIPTS, follow
from tests.kernels.triton.harness import by_triton

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the same on the GPU")


@pytest.fixture(autouse=True)
def _in_this_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    # On the CPU another thread prepares; on a GPU, where there are graphs, the one that looks up.
    monkeypatch.setattr("recemb_kernels.lookup._beside", lambda: SimpleNamespace(submit=at_once))


def prefetch(model: Model, bags: Bags) -> Any:
    """Prepare a batch; what of it: ``None`` where its look-up will."""
    model.engine.prefetch(model.tables, bags)
    assert bags.ahead is not None
    return bags.ahead.wait()


def steps(model: Model, batches: Sequence[Bags], ahead: bool = True) -> list[Tensor]:
    """Outputs, gradients of the weights and of what no optimizer holds, and the parameters in the end."""
    found = []
    for k, bags in enumerate(batches):
        for p in model.parameters:
            p.grad = None
        out = model.look_up(bags)
        if ahead and k + 1 < len(batches):
            prefetch(model, batches[k + 1])
        out.backward(gradient(out))
        found += [out.detach(), *(p.grad for p in model.parameters if p.grad is not None)]
        if bags.weights is not None:
            assert bags.weights.grad is not None
            found.append(bags.weights.grad)
    return [*found, *(p.detach().clone() for p in model.parameters)]


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("optimizer", "methods", "weighted"),
    [(None, ("qr",), True), ("adagrad", ("tt",), False), ("adam", ("dense", "md", "robe"), True)],
)
def test_bits_of_batches_that_come_as_they_are(
    optimizer: str | None, methods: Sequence[str], weighted: bool
) -> None:
    plain, model = Model(optimizer, methods), Model(optimizer, methods)
    with by_triton():
        expected = steps(plain, [plain.bags(seed, weighted=weighted) for seed in range(9)], ahead=False)
    with graphed(model) as (groups, recorder):
        found = steps(model, [model.bags(seed, weighted=weighted) for seed in range(9)])
    assert equal(expected, found)
    assert recorder.recorded == 4 * len(groups), "plan, copy, forward, backward"
    # Six look-ups and all their backwards but the first; plan and copy are tried when they are recorded.
    assert recorder.replayed == (7 + 7 + 6 + 5) * len(groups)


def captured(model: Model) -> None:
    """Have the model prepare its batches by a graph."""
    steps(model, [model.bags(seed) for seed in range(7)])


def test_what_is_prepared_is_planned_by_the_graph_and_one_batch_at_a_time() -> None:
    model = Model("sgd")
    with graphed(model):
        captured(model)
        one, two = model.bags(20), model.bags(21)
        assert isinstance(prefetch(model, one), Planned)
        assert prefetch(model, two) is None, "its memory still holds the first one"
        model.look_up(one)
        assert isinstance(prefetch(model, two), Planned)
        model.look_up(model.bags(22))  # takes its place, should it never be looked up
        assert isinstance(prefetch(model, model.bags(23)), Planned)


class Scripted:
    """A model that follows a script."""

    def __init__(self, model: Model, groups: Sequence[GraphedGroup]) -> None:
        self.model, self._groups = model, groups
        self._batches = {k: model.bags(30 + k) for k in (1, 2, 3)}

    def prepare(self, k: int) -> None:
        prefetch(self.model, self._batches[k])

    def drop(self, k: int) -> None:
        self._batches[k].ahead = None

    def look_up(self, k: int) -> Tensor:
        return self.model.look_up(self._batches[k])

    def forget_graphs(self) -> None:
        for group in self._groups:
            group._graphs.clear()

    def parameters(self) -> Sequence[Tensor]:
        return self.model.parameters


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_whatever_comes_between(script: str) -> None:
    plain, model = Model("adagrad"), Model("adagrad")
    with by_triton():
        steps(plain, [plain.bags(seed) for seed in range(7)], ahead=False)
        expected = follow(script, Scripted(plain, []), ahead=False)
    with graphed(model) as (groups, _):
        captured(model)
        found = follow(script, Scripted(model, groups), ahead=True)
    assert equal(expected, found)


def test_a_graph_gives_way_to_one_that_prepares_ahead() -> None:
    model = Model("sgd")
    with graphed(model) as (groups, recorder):
        steps(model, [model.bags(seed) for seed in range(6)], ahead=False)
        assert recorder.recorded == 2
        steps(model, [model.bags(seed) for seed in range(7)])
        assert isinstance(prefetch(model, model.bags(8)), Planned)
        assert [group.graphs for group in groups] == [1]
    assert recorder.recorded == 2 + 4


@pytest.mark.parametrize("why", ["no room", "no capture"])
def test_batches_that_no_graph_prepares_ahead(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their look-ups have one that does all, as if they were not prepared."""
    monkeypatch.setattr(graphs, "_PATIENCE", 0)
    plain, model, made = Model("adagrad"), Model("adagrad"), 0

    def recorder() -> FakeRecorder:
        nonlocal made
        made += 1
        recorder = FakeRecorder(model.persistent)
        recorder.num_bytes, recorder.most_bytes = 2, 3
        # Of the first graph, the second one records what is done ahead.
        return Refuses(model.persistent) if why == "no capture" and made == 2 else recorder

    with by_triton():
        expected = steps(plain, [plain.bags(seed) for seed in range(9)], ahead=False)
    warned = pytest.warns(UserWarning, match="no capture here") if why == "no capture" else nullcontext()
    with warned, by_triton(lambda group: GraphedGroup(group, recorder)) as groups:
        found = steps(model, [model.bags(seed) for seed in range(9)])
        assert [group.graphs for group in groups] == [1]
        assert prefetch(model, model.bags(9)) is None
    assert made == 3
    assert equal(expected, found)


def test_a_second_forward_within_a_backward_records_nothing() -> None:
    """Look-ups that overlap step one table twice: the second backward finds other weights."""
    plain, model = Model("sgd"), Model("sgd")

    def run(model: Model) -> list[Tensor]:
        for seed in range(8):
            outs = [model.look_up(model.bags(seed)), model.look_up(model.bags(50 + seed))]
            for out in outs:
                thread = Thread(target=out.backward, args=(gradient(out),))
                thread.start()
                thread.join()
        return [p.detach().clone() for p in model.parameters]

    with by_triton():
        expected = run(plain)
    with graphed(model) as (groups, recorder):
        found = run(model)
    assert equal(expected, found)
    assert recorder.recorded == 2
    assert [group.graphs for group in groups] == [1]


def test_prepared_look_ups_without_gradients() -> None:
    plain, model = Model(None), Model(None)
    with by_triton(), torch.no_grad():
        expected = [plain.look_up(plain.bags(seed)) for seed in range(7)]
    found = []
    with graphed(model) as (_, recorder), torch.no_grad():
        for seed in range(7):
            bags = model.bags(seed)
            prefetch(model, bags)
            found.append(model.look_up(bags))
    assert equal(expected, found)
    assert recorder.recorded == 3, "plan, copy, forward"


class Refuses(FakeRecorder):
    """Records nothing."""

    def __call__(self, run: Any) -> Any:
        raise RuntimeError("no capture here")


class Streams(StubGroup):
    """Notes in which order the streams are given work and waits."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def plan(self, batch: Batch) -> Call:
        self.calls.append("plan")
        return super().plan(batch)

    def run_beside(self, run: Any) -> tuple[Any, Any]:
        self.calls.append("beside (")
        made = run()
        self.calls.append(")")
        return made, SimpleNamespace(take=lambda held: self.calls.append("wait"))

    def hold_beside(self) -> None:
        self.calls.append("hold")


class Records(StubRecorder):
    def __init__(self, calls: list[str], name: str) -> None:
        self._calls, self._name = calls, name

    def __call__(self, run: Any) -> tuple[Any, Any]:
        self._calls.append(f"record {self._name}")
        return run(), lambda: self._calls.append(f"replay {self._name}")


def test_the_streams_wait_for_each_other() -> None:
    """A copy follows its plan, and the next plan that copy."""
    group = Streams()
    calls = group.calls
    batch = Batch(torch.zeros(3, dtype=torch.int64), torch.arange(4), None, 3)
    source = PlannedAhead(cast(Any, group), Records(calls, "plan"), Records(calls, "copy"), batch)
    assert calls == [
        *("beside (", "plan", "record plan", "plan", "replay plan", ")"),
        *("wait", "record copy", "replay copy", "hold"),
    ]
    prepared, taken = ["beside (", "replay plan", ")"], ["wait", "replay copy", "hold"]
    calls.clear()
    planned = source.prepare(batch)
    assert calls == prepared
    assert source.prepare(batch) is None
    source.bring(batch, planned)
    assert calls == prepared + taken
    calls.clear()
    dropped = source.prepare(batch)
    del dropped
    waits = source.prepare(batch)
    source.bring(batch, None)
    assert calls == 3 * prepared + taken, "what waits is prepared again when its turn comes"
    calls.clear()
    source.bring(batch, waits)
    assert calls == prepared + taken


def test_copies_share_no_memory() -> None:
    model = Model("sgd", ("tt",))
    with graphed(model) as _:
        call = prefetch(model, model.bags(1)).call
        assert isinstance(call, Call)
        own = call.copied()
    pairs = list(zip(tensors_of(call), tensors_of(own), strict=True))
    assert len(pairs) > 10
    for old, new in pairs:
        assert torch.equal(old, new)
        shared = old.data_ptr() == new.data_ptr()
        assert shared == any(old is key for key in tensors_of(call.keys)), "keys never change"
    assert copied([1, None, "x"]) == [1, None, "x"]
