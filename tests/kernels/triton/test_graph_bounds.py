"""How many graphs there are, how much memory they hold, and what happens where one cannot be captured."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from threading import Barrier, Thread
from typing import Any, cast
from weakref import ref

import pytest
import torch
from torch import Tensor

from recemb_kernels.digit_tree.group import Batch
from recemb_kernels.triton_frame import graphs
from recemb_kernels.triton_frame.family import Family
from recemb_kernels.triton_frame.graph_plans import Planned
from recemb_kernels.triton_frame.graphs import GraphedGroup
from tests.kernels.triton.graph_cases import (
    FakeRecorder,
    Model,
    StubGroup,
    StubRecorder,
    callers_capture,
    gradient,
    graphed,
    trained,
)
from tests.kernels.triton.harness import by_triton

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the same on the GPU")


def test_many_shapes_do_not_take_turns_in_being_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_MOST_GRAPHS", 2)
    model = Model("sgd")
    with graphed(model) as (groups, recorder), torch.no_grad():
        for _ in range(6):
            for size in (2, 3, 4, 5):
                model.look_up(model.bags(0, size=size))
    # Two fit; one of the others takes the place of one, and the next exchange is far off.
    assert [group.graphs for group in groups] == [2]
    assert recorder.recorded == 3


def test_graphs_stay_within_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_PATIENCE", 3)
    model = Model("sgd")
    made: list[FakeRecorder] = []

    def recorder() -> FakeRecorder:
        made.append(FakeRecorder(model.persistent))
        made[-1].num_bytes, made[-1].most_bytes = (1, 2) if len(made) < 4 else (3, 2)
        return made[-1]

    with by_triton(lambda group: GraphedGroup(group, recorder)) as groups, torch.no_grad():
        for size in (2, 3):
            for _ in range(4):
                model.look_up(model.bags(0, size=size))
        assert groups[0].graphs == 2
        for _ in range(4):
            model.look_up(model.bags(0, size=4))
        assert groups[0].graphs == 2  # the one of size 2 had to go
        made[1].num_bytes = 2  # as when its backward is recorded
        model.look_up(model.bags(0, size=3))
        assert groups[0].graphs == 1
        for _ in range(30):  # too large alone
            model.look_up(model.bags(0, size=5))
        assert groups[0].graphs == 0
    assert len(made) == 5


def test_shapes_that_do_not_fit_together_do_not_take_turns() -> None:
    model = Model("sgd")
    made: list[FakeRecorder] = []

    def recorder() -> FakeRecorder:
        made.append(FakeRecorder(model.persistent))
        made[-1].num_bytes, made[-1].most_bytes = 2, 3
        return made[-1]

    with by_triton(lambda group: GraphedGroup(group, recorder)), torch.no_grad():
        for k in range(40):
            model.look_up(model.bags(0, size=2 + k % 2))
    assert len(made) == 2


def test_after_some_failures_there_are_no_graphs() -> None:
    model = Model("sgd")
    fail = False

    class Fails(FakeRecorder):
        def __call__(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
            if fail:
                raise RuntimeError("no memory")
            return super().__call__(run)

    def look_up(sizes: Sequence[int]) -> None:
        for size in sizes:
            model.look_up(model.bags(0, size=size))

    with by_triton(lambda group: GraphedGroup(group, lambda: Fails(model.persistent))) as groups:
        with torch.no_grad():
            look_up(4 * [2])
            assert groups[0].graphs == 1
            fail = True
            with pytest.warns(UserWarning, match="no memory"):
                look_up(4 * [3] + 4 * [4])
            assert groups[0].graphs == 1
            with pytest.warns(UserWarning, match="no memory"):
                look_up(4 * [5])
        assert groups[0].graphs == 0


def test_failing_backwards_end_graphs_though_forwards_are_captured() -> None:
    model = Model("sgd")

    class Fails(FakeRecorder):
        def __call__(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
            if self.recorded:
                raise RuntimeError("no memory")
            return super().__call__(run)

    def steps(sizes: Sequence[int]) -> None:
        for size in sizes:
            for _ in range(6):
                out = model.look_up(model.bags(0, size=size))
                out.backward(gradient(out))

    with by_triton(lambda group: GraphedGroup(group, lambda: Fails(model.persistent))) as groups:
        with pytest.warns(UserWarning, match="no memory"):
            steps([2, 3, 4])
        steps([5])
    assert [group.graphs for group in groups] == [0]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_group_with_graphs_is_freed_without_the_collector(ahead: bool) -> None:
    group = GraphedGroup(cast(Any, StubGroup()), lambda: StubRecorder())
    batch = Batch(torch.zeros(3, dtype=torch.int64), torch.arange(4), None, 3)
    parameter = torch.zeros(1)
    for _ in range(5):
        state = group.prepare([parameter], batch) if ahead else None
        group.forward([parameter], batch, keep=False, state=state)
    assert group.graphs == 1
    waits = group.prepare([parameter], batch) if ahead else None
    assert isinstance(waits, Planned) == ahead
    watched = ref(parameter)
    gc.disable()
    try:
        del group, parameter
        assert watched() is None
    finally:
        gc.enable()


def prepared(group: GraphedGroup, parameters: list[Tensor], size: int) -> bool:
    """Prepare a batch of that size, and look it up; whether a graph has prepared it."""
    batch = Batch(torch.zeros(size, dtype=torch.int64), torch.arange(size + 1), None, size)
    state = group.prepare(parameters, batch)
    group.forward(parameters, batch, keep=True, state=state)
    assert state is not None
    return isinstance(state, Planned)


def test_what_waits_for_a_graph_in_vain_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_MOST_GRAPHS", 1)
    group, parameters = GraphedGroup(cast(Any, StubGroup()), lambda: StubRecorder()), [torch.zeros(1)]
    by_graph = [prepared(group, parameters, size) for size in (2, 3) for _ in range(5)]
    # The second size takes the place of the first, which has to wait for long.
    assert by_graph == 2 * [*4 * [False], True]
    assert group.graphs == 1
    assert not any(prepared(group, parameters, 2) for _ in range(6))
    assert prepared(group, parameters, 3)


def test_batches_that_are_all_prepared_get_their_graph_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_MOST_GRAPHS", 1)
    monkeypatch.setattr(graphs, "_PATIENCE", 10)
    group, parameters = GraphedGroup(cast(Any, StubGroup()), lambda: StubRecorder()), [torch.zeros(1)]
    for _ in range(5):
        prepared(group, parameters, 3)
    for _ in range(4):
        prepared(group, parameters, 2)
    held = [prepared(group, parameters, 3) for _ in range(20)]
    assert held == sorted(held), "by others until the wait is over, and by its graph from then on"
    assert 8 <= held.count(False) <= 12


def test_threads_that_look_up_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes come and go in one thread while another looks its own up."""
    monkeypatch.setattr(graphs, "_PATIENCE", 1)
    group = GraphedGroup(cast(Any, StubGroup()), lambda: StubRecorder())
    parameters, failed, start = [torch.zeros(1)], [], Barrier(4)

    def look_up() -> None:
        start.wait()
        try:
            for k in range(3000):
                size = 1 + k % 12
                batch = Batch(torch.zeros(size, dtype=torch.int64), torch.arange(size + 1), None, size)
                group.forward(parameters, batch, keep=False)
        except Exception as error:  # whatever it is
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [Thread(target=look_up) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed
    assert group.graphs <= graphs._MOST_GRAPHS


def test_replaced_tables_are_let_go() -> None:
    model = Model("sgd")
    with graphed(model) as (groups, _), torch.no_grad():
        for _ in range(5):
            model.look_up(model.bags(0))
        for p in model.parameters:
            p.data = p.data.clone()
        for _ in range(5):
            model.look_up(model.bags(0))
        assert groups[0].graphs == 1


def test_what_cannot_be_captured_stays_eager_with_a_warning() -> None:
    plain, model = Model("sgd"), Model("sgd")

    def refuse(run: Callable[[], Any]) -> Any:
        raise RuntimeError("no capture here")

    with by_triton():
        expected = trained(plain)
    with (
        pytest.warns(UserWarning, match="stay eager.*no capture here"),
        by_triton(lambda group: GraphedGroup(group, lambda: refuse)),
    ):
        found = trained(model)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@torch.no_grad()
def test_what_a_callers_graph_reads_is_never_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launches hold addresses of what the families remember, which make room for others."""
    model, read = Model(None, ("tt", "qr", "robe")), []
    remembered = Family.remembered

    def watched(self: Family[Any], numbers: tuple[int, ...]) -> Tensor:
        found = remembered(self, numbers)
        read.append(ref(found))
        return found

    with by_triton() as groups:
        model.look_up(model.bags(1))
        with callers_capture(), monkeypatch.context() as patch:
            patch.setattr(Family, "remembered", watched)
            model.look_up(model.bags(2))
    families = [family for group in groups for family, _ in group._families]
    for family in families:
        for k in range(600):
            family.remembered((k,))
        assert len(family.held()) < 300
    assert len(read) >= len(families)
    assert all(seen() is not None for seen in read)
