"""What is captured and what is not, and that a replay gives the bits of eager launches.

On the CPU a recorder stands for CUDA graphs: what it records has no effect then, and a replay runs it again
and fills the tensors that the recording gave. ``tests/gpu`` has the real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Thread

import pytest
import torch
from torch import Tensor

from recemb.errors import NonFiniteError
from tests.kernels.triton.graph_cases import (
    Model,
    gradient,
    graphed,
    trained,
)
from tests.kernels.triton.harness import by_triton

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the same on the GPU")


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
