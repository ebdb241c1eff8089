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

from recemb_kernels.digit_tree.group import Batch
from recemb_kernels.triton_frame.family import Call
from recemb_kernels.triton_frame.graph_plans import PlanGraph, Planned, PlannedAhead
from recemb_kernels.triton_frame.graphs import GraphedGroup
from recemb_kernels.triton_frame.group import TritonGroup
from recemb_kernels.triton_frame.streams import HandOver, copied, tensors_of
from tests.kernels.triton.graph_cases import (
    FakeRecorder,
    Model,
    StubGroup,
    StubRecorder,
    at_once,
    callers_capture,
    gradient,
    graphed,
    prefetch,
    steps,
)
from tests.kernels.triton.graph_scripts import SCRIPTS, brought, follow
from tests.kernels.triton.harness import by_triton

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the same on the GPU")


@pytest.fixture(autouse=True)
def _in_this_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    # On the CPU another thread prepares; on a GPU, where there are graphs, the one that looks up.
    monkeypatch.setattr("recemb_kernels.lookup._beside", lambda: SimpleNamespace(submit=at_once))


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
        expected = steps(plain, [plain.bags(seed, weighted=weighted) for seed in range(9)])
    with graphed(model) as (groups, recorder), brought() as seen:
        found = steps(model, [model.bags(seed, weighted=weighted) for seed in range(9)], ahead=1)
    assert equal(expected, found)
    assert seen == [False, False, *5 * [True]]
    assert recorder.recorded == 4 * len(groups), "plan, copy, forward, backward"
    # Six look-ups and all their backwards but the first; plan and copy are needed to record the look-up.
    assert recorder.replayed == (7 + 7 + 6 + 5) * len(groups)


def test_two_batches_ahead_from_the_first_one_on() -> None:
    plain, model = Model("sgd"), Model("sgd")
    with by_triton():
        expected = steps(plain, [plain.bags(seed) for seed in range(12)])
    with graphed(model), brought() as seen:
        found = steps(model, [model.bags(seed) for seed in range(12)], ahead=2)
    assert equal(expected, found)
    # The fourth is captured, whose plan and that of the fifth were made without a graph.
    assert seen == [False, False, False, *7 * [True]]


def captured(model: Model) -> None:
    """Have the model prepare its batches by a graph."""
    steps(model, [model.bags(seed) for seed in range(7)], ahead=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_those_of_the_look_up(dtype: torch.dtype) -> None:
    """With a graph and before there is one; float64 ones are copied when they are prepared."""
    plain, model = Model("sgd", ("qr",)), Model("sgd", ("qr",))

    def run(model: Model, ahead: bool) -> list[Tensor]:
        found = []
        for seed in range(9):
            bags = model.bags(seed, weighted=True)
            assert bags.weights is not None
            bags.weights = bags.weights.detach().to(dtype).requires_grad_()
            if ahead:
                prefetch(model, bags)
            with torch.no_grad():
                bags.weights.mul_(2)
            out = model.look_up(bags)
            out.backward(gradient(out))
            found += [out.detach(), bags.weights.grad]
        return [x for x in found if x is not None]

    with by_triton():
        expected = run(plain, False)
    with graphed(model), brought() as seen:
        found = run(model, True)
    assert seen.count(True) == 5
    assert equal(expected, found)


@torch.no_grad()
def evaluate(model: Model) -> list[Tensor]:
    """Look up batches, each prepared just before."""
    found = []
    for seed in range(7):
        bags = model.bags(seed)
        prefetch(model, bags)
        found.append(model.look_up(bags))
    return found


def test_evaluation_shares_the_graph_that_plans() -> None:
    model = Model("sgd")
    with graphed(model) as (groups, recorder), brought() as seen:
        captured(model)
        seen.clear()
        bags = model.bags(7)
        with torch.no_grad():
            prefetch(model, bags)
        out = model.look_up(bags)
        out.backward(gradient(out))
        assert seen == [True], "prepared without gradients, looked up with them"
        before = recorder.recorded
        evaluate(model)
        assert recorder.recorded == before + 1, "one for all: these forwards work on no distinct rows"
        bags = model.bags(8)
        with torch.no_grad():
            prefetch(model, bags)
        seen.clear()
        out = model.look_up(bags)
        out.backward(gradient(out))
        assert seen == [True], "as after evaluation"
    model = Model("sgd", ("tt",))
    with graphed(model) as (groups, recorder):
        captured(model)
        before = recorder.recorded
        evaluate(model)
        assert recorder.recorded == before + 2, "copy, forward"
        assert [group.graphs for group in groups] == [2]


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
        out = self.model.look_up(self._batches[k])
        self._batches[k].ahead = None  # as a collection lets go of it
        return out

    def forget_graphs(self) -> None:
        for group in self._groups:
            group._graphs.clear()

    def parameters(self) -> Sequence[Tensor]:
        return self.model.parameters


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_whatever_comes_between(script: tuple[str, list[bool]]) -> None:
    words, ahead = script
    plain, model = Model("adagrad"), Model("adagrad")
    with by_triton():
        steps(plain, [plain.bags(seed) for seed in range(7)])
        expected = follow(words, Scripted(plain, []), ahead=False)
    with graphed(model) as (groups, _):
        captured(model)
        with brought() as seen:
            found = follow(words, Scripted(model, groups), ahead=True)
    assert equal(expected, found)
    assert seen == ahead


def test_a_graph_gives_way_to_one_that_prepares_ahead() -> None:
    model = Model("sgd")
    with graphed(model) as (groups, recorder):
        steps(model, [model.bags(seed) for seed in range(6)])
        assert recorder.recorded == 2
        steps(model, [model.bags(seed) for seed in range(7)], ahead=1)
        assert isinstance(prefetch(model, model.bags(8)), Planned)
        assert [group.graphs for group in groups] == [1]
    assert recorder.recorded == 2 + 4


@pytest.mark.parametrize("why", ["no room", "no capture"])
def test_batches_that_no_graph_prepares_ahead(why: str) -> None:
    """Their look-ups have one that does all, as if they were not prepared."""
    plain, model, made = Model("adagrad"), Model("adagrad"), 0

    def recorder() -> FakeRecorder:
        nonlocal made
        made += 1
        recorder = FakeRecorder(model.persistent)
        recorder.num_bytes, recorder.most_bytes = 2, 3
        # The second one is to record what is done ahead.
        return Refuses(model.persistent) if why == "no capture" and made == 2 else recorder

    with by_triton():
        expected = steps(plain, [plain.bags(seed) for seed in range(9)])
    warned = pytest.warns(UserWarning, match="no capture here") if why == "no capture" else nullcontext()
    with warned, by_triton(lambda group: GraphedGroup(group, recorder)) as groups:
        found = steps(model, [model.bags(seed) for seed in range(9)], ahead=1)
        assert [group.graphs for group in groups] == [1]
        assert prefetch(model, model.bags(9)).call is None, "its look-up does it"
    assert made == (2 if why == "no capture" else 3)
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


@pytest.mark.parametrize(("method", "recorded"), [("md", 1), ("tt", 3)])
def test_prepared_look_ups_without_gradients(method: str, recorded: int) -> None:
    """Of trains plan, copy and forward; one graph where the forward needs no plan."""
    plain, model = Model(None, (method,)), Model(None, (method,))
    with by_triton(), torch.no_grad():
        expected = [plain.look_up(plain.bags(seed)) for seed in range(7)]
    with graphed(model) as (_, recorder):
        found = evaluate(model)
    assert equal(expected, found)
    assert recorder.recorded == recorded


@pytest.mark.parametrize("seeds", [2, 7])
def test_a_callers_capture_waits_for_nothing_outside(seeds: int) -> None:
    """It plans its batch itself, whether a graph has done so by now or not."""
    model = Model(None, ("tt",))
    with graphed(model), torch.no_grad():
        for seed in range(seeds):
            bags = model.bags(seed)
            prepared = prefetch(model, bags)
            model.look_up(bags)
        assert isinstance(prepared, Planned) == (seeds == 7)
        one, other = model.bags(9), model.bags(9)
        prepared = prefetch(model, one)
        waits = SimpleNamespace(take=lambda held: pytest.fail("it waits"))
        (prepared if isinstance(prepared, Planned) else prepared.call).ready = waits
        one.handed = cast(Any, waits)  # as on a GPU
        with brought() as seen, callers_capture():
            assert torch.equal(model.look_up(one), model.look_up(other))
        assert seen == []


@torch.no_grad()
def test_nor_without_graphs() -> None:
    model = Model(None, ("tt",))
    with by_triton():
        one, other = model.bags(9), model.bags(9)
        waits = SimpleNamespace(take=lambda held: pytest.fail("it waits"))
        prefetch(model, one).ready = waits
        one.handed = cast(Any, waits)
        with callers_capture():
            assert torch.equal(model.look_up(one), model.look_up(other))


def test_a_callers_capture_checks_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mark of one that was checked before says nothing of those that are replayed."""
    model, checked = Model(None, ("tt",)), []
    with by_triton(), torch.no_grad():
        bags = model.bags(9)
        prefetch(model, bags)
        bags.handed = cast(Any, SimpleNamespace(take=lambda held: pytest.fail("it waits")))
        bags.refused = torch.ones(1, dtype=torch.int32)
        monkeypatch.setattr(model.engine, "_check", lambda _, bags: checked.append(bags.refused))
        with callers_capture():
            model.look_up(bags)
    assert checked == [None]


@pytest.mark.parametrize("graphs", [False, True])
def test_nothing_is_prepared_in_a_callers_capture(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream beside would join the capture, and nothing would have it leave."""
    model = Model(None, ("tt",))
    with graphed(model) if graphs else by_triton(), torch.no_grad():
        model.look_up(model.bags(1))
        bags, other = model.bags(9), model.bags(9)
        with monkeypatch.context() as patch, callers_capture():
            patch.setattr(TritonGroup, "run_beside", lambda *_: pytest.fail("it runs beside"))
            assert not model.engine.prefetch(model.tables, bags)
            assert (bags.ahead, bags.handed, bags.checked) == (None, None, False)
            assert torch.equal(model.look_up(bags), model.look_up(other))


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
        return made, SimpleNamespace(take=lambda held: self.calls.append("plan is there"))

    def hold_beside(self) -> None:
        self.calls.append("hold")


class Records(StubRecorder):
    def __init__(self, calls: list[str], name: str) -> None:
        self._calls, self._name = calls, name

    def __call__(self, run: Any) -> tuple[Any, Any]:
        self._calls.append(f"record {self._name}")
        return run(), lambda: self._calls.append(f"replay {self._name}")


def test_the_streams_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy follows its plan, and the next plan that copy."""
    group = Streams()
    calls = group.calls
    handed = SimpleNamespace(take=lambda held: calls.append("batch is there"))
    monkeypatch.setattr(HandOver, "now", lambda device: handed)
    batch = Batch(torch.zeros(3, dtype=torch.int64), torch.arange(4), None, 3)
    planned = ["beside (", "batch is there", "replay plan", ")"]
    taken = ["plan is there", "replay copy", "hold"]
    plans = PlanGraph(cast(Any, group), Records(calls, "plan"), batch)
    assert calls == ["beside (", "plan", "record plan", "plan", ")"]
    calls.clear()
    source = PlannedAhead(plans, Records(calls, "copy"), batch)
    assert calls == ["record copy", *planned, *taken]
    calls.clear()
    one, two = plans.prepare(batch), plans.prepare(batch)
    assert calls == planned, "the second waits"
    source.bring(batch, one)
    assert calls == planned + taken + planned, "and is planned as soon as the first has been taken"
    calls.clear()
    three = plans.prepare(batch)
    source.bring(batch, three)
    assert calls == planned + taken + planned, "in its turn, in the second's place, which gets it back"
    calls.clear()
    source.bring(batch, two)
    assert calls == taken
    calls.clear()
    dropped = plans.prepare(batch)
    del dropped
    never = plans.prepare(batch)
    assert calls == 2 * planned
    for again in (planned, []):
        calls.clear()
        source.bring(batch, None)
        assert calls == planned + taken + again, "what is never looked up is planned again, but once"
    calls.clear()
    plans.prepare(batch)
    assert calls == planned
    assert never.displaced


def test_copies_share_no_memory() -> None:
    model = Model("sgd", ("tt",))
    with graphed(model):
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
