"""C++ sees what has changed of tables since they were last looked up as Python sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.distributed.optim.apply_optimizer_in_backward import param_to_optim_hook_handle_map

from recemb.backends.base import Backend
from recemb.backends.native import _now, _prepare
from tests.kernels.cases import make_bags, make_engine, settings_of, step_all, step_or_skip

CHANGES: dict[str, Callable[[Backend, nn.Parameter], Any]] = {
    "nothing": lambda table, parameter: None,
    "rate": lambda table, parameter: [settings_of(each).update(lr=0.2) for each in table.parameters()],
    "one rate": lambda table, parameter: settings_of(parameter).update(lr=0.2),
    "eps": lambda table, parameter: settings_of(parameter).update(eps=1e-3),
    "list": lambda table, parameter: settings_of(parameter)["betas"].reverse(),
    "option": lambda table, parameter: settings_of(parameter).update(new=1),
    "another option": lambda table, parameter: settings_of(parameter).update(
        new=settings_of(parameter).pop("maximize")
    ),
    "group": lambda table, parameter: parameter._in_backward_optimizers[0].param_groups.append({}),
    "another optimizer": lambda table, parameter: parameter._in_backward_optimizers.__setitem__(
        0, torch.optim.Adagrad([parameter], lr=0.1)
    ),
    "rate as tensor": lambda table, parameter: settings_of(parameter).update(lr=torch.tensor(0.1)),
    "frozen": lambda table, parameter: parameter.requires_grad_(False),
    "optimizer": lambda table, parameter: apply_optimizer_in_backward(
        torch.optim.SGD, [parameter], {"lr": 0.1}
    ),
    "no optimizer": lambda table, parameter: setattr(parameter, "_in_backward_optimizers", []),
    "hook": lambda table, parameter: [
        handle.remove() for handle in param_to_optim_hook_handle_map[parameter]
    ],
    "dtype": lambda table, parameter: setattr(parameter, "data", parameter.data.double()),
    "layout": lambda table, parameter: setattr(
        parameter, "data", parameter.data.repeat(1, 2)[:, : parameter.shape[1]]
    ),
    "shape": lambda table, parameter: setattr(parameter, "data", parameter.data[:-1].clone()),
    "address": lambda table, parameter: setattr(
        parameter, "data", torch.empty(parameter.numel() + 1)[1:].view(parameter.shape)
    ),
    "storage": lambda table, parameter: setattr(parameter, "data", parameter.data.clone()),
    "parameter": lambda table, parameter: setattr(table, _first(table), nn.Parameter(parameter.detach())),
    "parameter of that optimizer": lambda table, parameter: setattr(table, _first(table), _twin(parameter)),
    "none": lambda table, parameter: table.register_parameter("none", None),
    "one less": lambda table, parameter: table._parameters.popitem(),
    "name of the last": lambda table, parameter: table._parameters.update(
        core_x=table._parameters.pop("core_2")
    ),
    "one more": lambda table, parameter: table.register_parameter("more", nn.Parameter(torch.ones(1))),
    "name": lambda table, parameter: table._parameters.update(
        core_0=table._parameters.pop("core_0"), core_x=table._parameters.pop("core_2")
    ),
}
SETTINGS = (
    *("rate", "one rate", "eps", "list", "option", "another option", "rate as tensor"),
    *("group", "another optimizer", "hook"),
)


def _twin(parameter: nn.Parameter) -> nn.Parameter:
    twin = nn.Parameter(parameter.detach())
    twin._in_backward_optimizers = getattr(parameter, "_in_backward_optimizers", [])  # type: ignore[attr-defined]
    return twin


def _first(table: Backend) -> str:
    return next(iter(table._parameters))


@pytest.mark.parametrize(
    ("steps", "change"),
    [(steps, change) for steps in (True, False) for change in CHANGES if steps or change not in SETTINGS],
)
def test_a_change_is_seen_as_python_sees_it(change: str, steps: bool) -> None:
    step_or_skip()
    engine, tables = make_engine(methods=("tt", "qr"))
    if steps:
        kind = torch.optim.Adam if change == "list" else torch.optim.Adagrad
        step_all(tables, kind, 0.1)
        for parameter in tables["tt"].parameters() if change == "list" else ():
            settings_of(parameter)["betas"] = [0.9, 0.999]
    engine(tables, make_bags(engine, 9, 3, seed=1))
    served = [tables[target.table] for target in engine.targets]
    prepared = _prepare(served)
    found = prepared.found[True]
    assert found.bound is not None
    compiled = found.bound.compiled
    assert compiled is not None
    CHANGES[change](tables["tt"], next(tables["tt"].parameters()))
    owned = [table._parameters for table in served]
    with torch.no_grad():
        assert compiled.unchanged(owned) is None, "and there is nothing to step"
    quick = compiled.unchanged(owned)
    # By the long way, which is taken where C++ does not know.
    found.bound.compiled = None
    known, stored = _now(served, prepared)
    always = ("nothing", "rate", "storage", "none")
    # No optimizer holds it, or there was none.
    without = ("parameter", "parameter of that optimizer", "no optimizer")
    assert (known is found) == (change in always or (change in without and not steps))
    assert (quick is not None) == (known is found)
    if quick is not None:
        assert all(a is b for a, b in zip(quick, stored, strict=True))
