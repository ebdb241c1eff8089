"""Adam on whole gradients, lazy: the rows that a kernel would not touch keep their bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from recemb.optim.adam import LazyAdam, is_lazy_adam

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


def test_only_plain_adam_is_lazy() -> None:
    assert is_lazy_adam(torch.optim.Adam, {"weight_decay": 0.0, "amsgrad": False, "maximize": False})
    assert not is_lazy_adam(torch.optim.Adam, {"weight_decay": 0.1})
    assert not is_lazy_adam(torch.optim.Adam, {"amsgrad": True})
    assert not is_lazy_adam(torch.optim.AdamW, {})
