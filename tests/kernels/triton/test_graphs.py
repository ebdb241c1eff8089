"""What is captured and what is not, and that a replay gives the bits of eager launches.

On the CPU a recorder stands for CUDA graphs: what it records has no effect then, and a replay runs it again
and fills the tensors that the recording gave. ``tests/gpu`` has the real ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Barrier, Thread
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torchrec
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

from recemb.backends.base import Backend
from recemb.bags import Bags
from recemb.engine import Engine
from recemb.errors import NonFiniteError
from recemb_kernels.digit_tree.group import Batch
from recemb_kernels.triton_frame import graphs
from recemb_kernels.triton_frame.graphs import GraphedGroup
from recemb_kernels.triton_frame.streams import tensors_of
from tests.kernels.cases import make_bags, make_engine
from tests.kernels.triton.harness import by_triton

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the same on the GPU")

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, float]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.5}),
    "rowwise_adagrad": (torchrec.optim.RowWiseAdagrad, {"lr": 0.1}),
    "adam": (torch.optim.Adam, {"lr": 0.1}),
}
Tables = dict[str, Backend]


class FakeRecorder:
    """Counts what it records and replays.

    Args:
        persistent: tensors that a recording must leave as they are.
    """

    def __init__(self, persistent: Callable[[], list[Tensor]]) -> None:
        self._persistent, self.recorded, self.replayed = persistent, 0, 0
        self.num_bytes, self.most_bytes = 0, 1

    def __call__(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.recorded += 1
        held = self._persistent()
        before = [tensor.detach().clone() for tensor in held]
        result = run()
        for tensor, old in zip(held, before, strict=True):
            tensor.detach().copy_(old)
        own = list(tensors_of(_open(result)))
        for tensor in own:
            tensor.fill_(True if tensor.dtype is torch.bool else 7)

        def replay() -> None:
            self.replayed += 1
            for mine, new in zip(own, list(tensors_of(_open(run()))), strict=True):
                mine.copy_(new)

        return result, replay


def _open(result: Any) -> list[Any]:
    """What a recording gives, without what the caller gave: batch and keys."""
    return [
        {name: value for name, value in vars(item).items() if name not in ("batch", "keys")}
        if hasattr(item, "keys") and hasattr(item, "batch")
        else item
        for item in result
    ]


class Model:
    """An engine, its tables, and steps on them."""

    def __init__(self, optimizer: str | None = None, methods: Sequence[str] = ("dense", "md")) -> None:
        self.engine: Engine
        self.tables: Tables
        self.engine, self.tables = make_engine(methods=methods)
        self.parameters = [p for table in self.tables.values() for p in table.parameters()]
        if optimizer is not None:
            kind, settings = OPTIMIZERS[optimizer]
            apply_optimizer_in_backward(kind, self.parameters, dict(settings))

    def persistent(self) -> list[Tensor]:
        states = [
            value
            for p in self.parameters
            for held in getattr(p, "_in_backward_optimizers", [])
            for state in held.state.values()
            for value in state.values()
            if isinstance(value, Tensor) and value.dim()
        ]
        return [*self.parameters, *states]

    def bags(self, seed: int, size: int = 5, weighted: bool = False) -> Bags:
        """Batches of one size have equally many ids."""
        bags = make_bags(self.engine, size, 3, 0)
        generator = torch.Generator().manual_seed(seed)
        limits = [target.num_embeddings for target in self.engine.targets]
        each = bags.offsets[:: bags.batch_size].diff().tolist()
        ids = [torch.randint(0, n, (k,), generator=generator) for n, k in zip(limits, each, strict=True)]
        bags.ids = torch.cat(ids)
        if weighted:
            bags.weights = torch.randn(bags.ids.numel(), generator=generator).requires_grad_()
        return bags

    def look_up(self, bags: Bags) -> Tensor:
        return self.engine(self.tables, bags)


class StubGroup:
    """Launches nothing."""

    def on_device(self) -> AbstractContextManager[None]:
        return nullcontext()

    def plan(self, batch: Batch) -> None:
        return None

    def remembered(self) -> list[Tensor]:
        return []

    def run_forward(self, parameters: Any, batch: Batch, *, keep: bool, state: Any) -> tuple[Tensor, None]:
        return torch.zeros(batch.size), None

    def forward(self, parameters: Any, batch: Batch, *, keep: bool, state: Any = None) -> tuple[Tensor, None]:
        return torch.zeros(batch.size), None


class StubRecorder:
    """Replays nothing."""

    num_bytes, most_bytes = 0, 1

    def __call__(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        return run(), lambda: None


def at_once(run: Callable[..., Any], *args: Any) -> Any:
    """Stands for a thread pool."""
    made = run(*args)
    return SimpleNamespace(result=lambda: made)


def gradient(out: Tensor) -> Tensor:
    return torch.sin(torch.arange(out.numel(), dtype=torch.float32)).view(out.shape)


@contextmanager
def graphed(model: Model) -> Iterator[tuple[list[GraphedGroup], FakeRecorder]]:
    recorder = FakeRecorder(model.persistent)
    with by_triton(lambda group: GraphedGroup(group, lambda: recorder)) as groups:
        yield groups, recorder


def trained(model: Model, weighted: bool = False) -> list[Tensor]:
    """Outputs, gradients and weights of six steps, their rate changing on the way."""
    found = []
    for seed in range(6):
        bags = model.bags(seed, weighted=weighted)
        for p in model.parameters:
            p.grad = None
            for held in getattr(p, "_in_backward_optimizers", []):
                held.param_groups[0]["lr"] = 0.1 / (1 + seed)
        out = model.look_up(bags)
        out.backward(gradient(out))
        found += [out.detach(), *(p.grad for p in model.parameters if p.grad is not None)]
        if bags.weights is not None:
            assert bags.weights.grad is not None
            found.append(bags.weights.grad)
    return [*found, *(p.detach().clone() for p in model.parameters)]


@pytest.mark.parametrize(
    ("optimizer", "methods", "weighted"),
    [
        (None, ("qr",), True),
        ("adagrad", ("tt",), False),
        ("rowwise_adagrad", ("robe", "md"), True),
        ("adam", ("dense", "qr", "md"), False),
    ],
)
def test_replays_give_the_bits_of_eager_launches(
    optimizer: str | None, methods: Sequence[str], weighted: bool
) -> None:
    plain, model = Model(optimizer, methods), Model(optimizer, methods)
    with by_triton():
        expected = trained(plain, weighted)
    with graphed(model) as (groups, recorder):
        found = trained(model, weighted)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    # After three eager steps a forward is recorded, a step later its backward.
    assert recorder.recorded == 2 * len(groups)
    assert recorder.replayed == (3 + 2) * len(groups)


def test_look_ups_that_overlap_do_not_share_memory() -> None:
    plain, model = Model("sgd"), Model("sgd")

    def run(model: Model) -> list[Tensor]:
        for seed in range(5):
            out = model.look_up(model.bags(seed))
            out.backward(gradient(out))
        first, second = model.look_up(model.bags(10)), model.look_up(model.bags(11))
        third = model.look_up(model.bags(12, size=4))
        for out in (second, first, third):
            out.backward(gradient(out))
        return [*(x.detach() for x in (first, second, third)), *model.parameters]

    with by_triton():
        expected = run(plain)
    with graphed(model) as (_, recorder):
        found = run(model)
    assert recorder.recorded == 2
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_second_backward_after_another_look_up_is_of_its_own_batch() -> None:
    plain, model = Model(None, ("qr",)), Model(None, ("qr",))

    def run(model: Model) -> list[Tensor]:
        for seed in range(5):
            out = model.look_up(model.bags(seed))
            out.backward(gradient(out))
        for p in model.parameters:
            p.grad = None
        out = model.look_up(model.bags(10))
        out.backward(gradient(out), retain_graph=True)
        model.look_up(model.bags(11)).sum().backward()
        out.backward(gradient(out))
        return [p.grad for p in model.parameters if p.grad is not None]

    with by_triton():
        expected = run(plain)
    with graphed(model):
        found = run(model)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_look_ups_whose_outputs_are_dropped_leave_the_graph_free() -> None:
    model = Model("sgd")
    with graphed(model) as (groups, recorder):
        for seed in range(8):
            model.look_up(model.bags(seed))
        assert [group.graphs for group in groups] == [1]
    assert recorder.replayed == 5


def test_shapes_that_do_not_recur_stay_eager() -> None:
    model = Model("sgd")
    with graphed(model) as (groups, recorder), torch.no_grad():
        for size in range(2, 8):
            model.look_up(model.bags(0, size=size))
    assert recorder.recorded == 0
    assert groups[0].graphs == 0


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


def test_graphs_stay_within_their_memory() -> None:
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
        for _ in range(6):  # too large alone
            model.look_up(model.bags(0, size=5))
        assert groups[0].graphs == 0
    assert len(made) == 4


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


def test_inference_mode_and_others_share_a_graph() -> None:
    plain, model = Model(None, ("qr",)), Model(None, ("qr",))
    with by_triton(), torch.no_grad():
        expected = [plain.look_up(plain.bags(seed)) for seed in range(10)]
    with graphed(model) as (_, recorder):
        with torch.inference_mode():
            found = [model.look_up(model.bags(seed)) for seed in range(5)]
        with torch.no_grad():
            found += [model.look_up(model.bags(seed)) for seed in range(5, 8)]
        with torch.inference_mode():
            found += [model.look_up(model.bags(seed)) for seed in range(8, 10)]
    assert recorder.replayed == 7
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_threads_have_graphs_of_their_own() -> None:
    model = Model(None, ("qr",))

    def look_up() -> None:
        with torch.no_grad():
            for seed in range(5):
                model.look_up(model.bags(seed))

    with graphed(model) as (groups, _):
        for _ in range(2):
            thread = Thread(target=look_up)
            look_up()
            thread.start()
            thread.join()
        assert groups[0].graphs >= 2


def test_prefetched_batches_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    # On the CPU another thread prepares; on a GPU, where there are graphs, the one that looks up.
    monkeypatch.setattr("recemb_kernels.lookup._beside", lambda: SimpleNamespace(submit=at_once))
    plain, model = Model("adagrad"), Model("adagrad")

    def run(model: Model, ahead: bool) -> list[Tensor]:
        given = [model.bags(seed) for seed in range(7)]
        for k, bags in enumerate(given):
            out = model.look_up(bags)
            if ahead and k + 1 < len(given):
                model.engine.prefetch(model.tables, given[k + 1])
            out.backward(gradient(out))
        return [p.detach().clone() for p in model.parameters]

    with by_triton():
        expected = run(plain, False)
    with graphed(model) as (_, recorder):
        found = run(model, True)
    assert recorder.recorded == 2
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


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


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = Model("adagrad")
    with graphed(model):
        for seed in range(6):
            out = model.look_up(model.bags(seed))
            out.backward(gradient(out))
        before = [p.detach().clone() for p in model.parameters]
        with pytest.raises(NonFiniteError, match="none of their weights was changed"):
            model.look_up(model.bags(6)).sum().mul(float("nan")).backward()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters, strict=True))
        out = model.look_up(model.bags(7))
        out.backward(gradient(out))
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters, strict=True))


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
