"""Updates that C++ remembers: made by Python once, and again where a setting or a state is another object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torchrec
from torch import Tensor

from recemb.optim import FusedUpdate
from recemb_kernels.update import Update
from tests.kernels.cases import make_bags, make_engine, step_all, step_or_skip
from tests.kernels.test_step import from_python

METHODS = ("tt", "qr", "dense")
Change = Callable[[torch.optim.Optimizer, Tensor], object]


def rate(optimizer: torch.optim.Optimizer, _: Tensor) -> None:
    optimizer.param_groups[0]["lr"] *= 0.25


def reload(optimizer: torch.optim.Optimizer, _: Tensor) -> None:
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.03
    optimizer.load_state_dict(state)


def other_groups(optimizer: torch.optim.Optimizer, _: Tensor) -> None:
    optimizer.param_groups = [{**optimizer.param_groups[0], "lr": 0.01}]


def other_tensor(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    state = optimizer.state[parameter]
    state["sum"] = state["sum"] + 1


def other_entry(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    state = optimizer.state[parameter]
    optimizer.state[parameter] = {"step": state["step"], "sum": state["sum"] * 2}


def other_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    state = optimizer.state[parameter]
    optimizer.state = {parameter: {"step": state["step"].clone(), "sum": state["sum"].clone() + 3}}


def train(
    change: Change | None,
    kind: type[torch.optim.Optimizer],
    made: list[int] | None,
    settings: Mapping[str, Any] | None = None,
    *,
    left: bool = False,
) -> list[Tensor]:
    """All that training changes; ``change`` acts between the forward and the backward of the fourth step.

    Args:
        change: of every optimizer and its parameter.
        kind: of the optimizers.
        made: takes how many updates have been made, step by step.
        settings: of each optimizer's group, in copies.
        left: whether some parameters of tables take no step.
    """
    engine, tables = make_engine(methods=METHODS)
    step_all(tables, kind, 0.1)
    if left:
        list(tables["tt"].parameters())[1].requires_grad_(False)
        next(tables["qr"].parameters())._in_backward_optimizers = []
    every = [parameter for table in tables.values() for parameter in table.parameters()]
    parameters = [p for p in every if p.requires_grad and p._in_backward_optimizers]
    for parameter in parameters:
        parameter._in_backward_optimizers[0].param_groups[0].update(deepcopy(settings or {}))
    count = 0
    plain = FusedUpdate._make

    def counted(self: FusedUpdate, *arguments: Any) -> Update:
        nonlocal count
        count += 1
        return plain(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedUpdate, "_make", counted)
        for step in range(7):
            out = engine(tables, make_bags(engine, 23, 1 + step % 2, seed=step))
            if change is not None and step == 3:
                for parameter in parameters:
                    change(parameter._in_backward_optimizers[0], parameter)
            out.square().sum().backward()
            if made is not None:
                made.append(count)
    states = [
        value
        for parameter in parameters
        for value in parameter._in_backward_optimizers[0].state[parameter].values()
        if isinstance(value, Tensor)
    ]
    return [tensor.detach().clone() for tensor in (*every, *states)]


OF_SETTINGS: tuple[Change | None, ...] = (None, rate, reload, other_groups)
OF_STATES: tuple[Change, ...] = (other_tensor, other_entry, other_state)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *product((torch.optim.Adagrad, torchrec.optim.RowWiseAdagrad), (*OF_SETTINGS, *OF_STATES)),
        *product((torch.optim.SGD,), OF_SETTINGS),  # has no state
    ],
)
@pytest.mark.parametrize("left", [False, True])
def test_an_update_is_made_again_where_what_it_is_made_of_has_changed(
    change: Change | None,
    kind: type[torch.optim.Optimizer],
    left: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step_or_skip()
    made: list[int] = []
    ours = train(change, kind, made, left=left)
    each = len(METHODS)
    before, after = made[2:4]
    assert before == each, "steps of which nothing has changed asked for updates"
    assert after - before == (0 if change is None else each), "the change was not seen in its own backward"
    unseen = train(None, kind, None, left=left)
    with monkeypatch.context() as patch:
        from_python(patch)
        truth = train(change, kind, None, left=left)
    assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))
    assert (change is None) == all(torch.equal(a, b) for a, b in zip(ours, unseen, strict=True))


@pytest.mark.parametrize(
    ("kind", "name", "value", "change"),
    [
        (torch.optim.Adam, "betas", [0.9, 0.999], lambda betas: betas.__setitem__(0, 0.2)),
        (torch.optim.Adagrad, "lr", torch.tensor(0.1), lambda lr: lr.mul_(0.1)),
    ],
)
def test_what_changes_in_place_is_asked_for_in_every_step(
    kind: type[torch.optim.Optimizer], name: str, value: Any, change: Callable[[Any], object]
) -> None:
    """A list, as of a checkpoint's betas, and a rate that is a tensor."""

    def changed(optimizer: torch.optim.Optimizer, _: Tensor) -> None:
        change(optimizer.param_groups[0][name])

    step_or_skip()
    made: list[int] = []
    settings = {name: value}
    ours = train(changed, kind, made, settings=settings)
    assert made == [len(METHODS) * (k + 1) for k in range(len(made))]
    assert not all(
        torch.equal(a, b) for a, b in zip(ours, train(None, kind, None, settings=settings), strict=True)
    )


def test_an_update_that_cannot_be_made_is_made_once_it_can() -> None:
    step_or_skip()
    engine, tables = make_engine(methods=METHODS)
    step_all(tables, torch.optim.Adagrad, 0.1)
    parameters = [parameter for table in tables.values() for parameter in table.parameters()]
    look_up = partial(engine, tables, make_bags(engine, 9, 1, seed=0))
    look_up().sum().backward()
    (optimizer,) = parameters[0]._in_backward_optimizers
    total = optimizer.state[parameters[0]].pop("sum")
    before = [parameter.detach().clone() for parameter in parameters]
    out = look_up()
    with pytest.raises(Exception, match="no 'sum'"):
        out.sum().backward(retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    optimizer.state[parameters[0]]["sum"] = total
    out.sum().backward()
    assert not any(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
