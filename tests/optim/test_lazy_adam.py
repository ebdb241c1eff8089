"""Adam on whole gradients, lazy: the rows that a kernel would not touch keep their bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recemb.optim.adam import LazyAdam

SETTINGS = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3}


def run(
    kind: type[torch.optim.Adam], weight: Tensor, grads: list[Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    parameter = nn.Parameter(weight.clone())
    optimizer = kind([parameter], **SETTINGS)
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.detach(), dict(optimizer.state[parameter])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_are_all_touched_take_torchs_step(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(9, 5, dtype=dtype)
    grads = [torch.randn(9, 5, dtype=dtype) for _ in range(6)]
    own, state = run(LazyAdam, weight, grads)
    wanted, expected = run(torch.optim.Adam, weight, grads)
    bound = {torch.float32: 3e-7, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(own, wanted, rtol=0, atol=bound)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=bound, atol=bound)
    assert float((own - weight).abs().min()) > 1e-3


def test_other_rows_neither_move_nor_decay() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 3)
    first, second = torch.randn(6, 3), torch.randn(6, 3)
    second[[1, 4]] = 0
    # An element of 0 in a touched row still decays.
    second[2, 0] = 0
    before, held = run(LazyAdam, weight, [first])
    after, state = run(LazyAdam, weight, [first, second])
    still = torch.tensor([1, 4])
    moved = torch.tensor([0, 2, 3, 5])
    assert torch.equal(after[still], before[still])
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[name][still], held[name][still])
        assert bool((state[name][moved] != held[name][moved]).all())
    assert bool((after[moved] != before[moved]).all())
    assert float(state["step"]) == 2


@pytest.mark.parametrize("option", ["weight_decay", "maximize"])
def test_an_option_that_moves_every_row_is_torchs_step_from_then_on(option: str) -> None:
    torch.manual_seed(0)
    weight, grads = torch.randn(4, 3), [torch.randn(4, 3), torch.zeros(4, 3)]
    found = []
    for kind in (LazyAdam, torch.optim.Adam):
        parameter = nn.Parameter(weight.clone())
        optimizer = kind([parameter], **SETTINGS)
        for grad in grads:
            parameter.grad = grad.clone()
            optimizer.step()
            optimizer.param_groups[0][option] = 0.1
        found.append(parameter.detach())
    torch.testing.assert_close(*found, rtol=0, atol=3e-7)
    assert not torch.equal(found[0], run(LazyAdam, weight, grads)[0])


def test_hooks_of_a_step_run_once() -> None:
    parameter, counted = nn.Parameter(torch.ones(2, 2)), []
    optimizer = LazyAdam([parameter], **SETTINGS)
    torch.optim.Adam([nn.Parameter(torch.ones(1, 1))])  # wraps torch's own step
    optimizer.register_step_post_hook(lambda *_: counted.append(1))
    for decay in (0.0, 0.1):
        optimizer.param_groups[0]["weight_decay"] = decay
        parameter.grad = torch.ones(2, 2)
        optimizer.step()
    assert len(counted) == 2


def test_state_moves_between_both() -> None:
    torch.manual_seed(0)
    parameter, grads = nn.Parameter(torch.randn(4, 3)), [torch.randn(4, 3) for _ in range(3)]
    wanted, _ = run(torch.optim.Adam, parameter.detach(), grads)
    state: dict[str, Any] | None = None
    for kind, grad in zip((LazyAdam, torch.optim.Adam, LazyAdam), grads, strict=True):
        optimizer = kind([parameter], **SETTINGS)
        if state is not None:
            optimizer.load_state_dict(state)
        parameter.grad = grad.clone()
        optimizer.step()
        state = optimizer.state_dict()
    torch.testing.assert_close(parameter.detach(), wanted, rtol=0, atol=3e-7)


def test_rows_that_were_never_touched_stay_without_an_eps() -> None:
    weight, grad = torch.ones(3, 2), torch.tensor([[1.0, -2.0], [0.0, 0.0], [0.5, 0.5]])
    parameter = nn.Parameter(weight.clone())
    optimizer = LazyAdam([parameter], lr=0.1, eps=0.0)
    parameter.grad = grad
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), weight - 0.1 * grad.sign())
