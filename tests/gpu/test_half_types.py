"""Collections of half types on a GPU against float32's of the same numbers on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

from tests.gpu.test_collection import collection, features, loss_of

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16)
# Large steps: small ones are rounded away.
_ROWS, _BATCH, _LEARNING_RATE = 500, 16, 1e3
# Of the largest number: products of cores and gradients are rounded to the type, and the interpreter cuts
# bfloat16 off where a GPU rounds.
_UNITS = 4


def _assert_near(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    off = (found.cpu().float() - exact).abs().max()
    assert off <= _UNITS * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_half_types_are_read_and_stepped_on(dtype: torch.dtype, fused: bool) -> None:
    """Outputs, and gradients or parameters after a step of SGD's."""
    half = collection("cpu", rows=_ROWS).to(dtype)
    exact = copy.deepcopy(half).float()
    half = half.to("cuda")
    before = [parameter.detach().clone() for parameter in half.parameters()]
    if fused:
        for module in (half, exact):
            apply_optimizer_in_backward(torch.optim.SGD, module.parameters(), {"lr": _LEARNING_RATE})
    batch = features(1, _BATCH, rows=_ROWS)
    ours, theirs = half(batch.to("cuda")).values(), exact(batch).values()
    assert ours.dtype is torch.float32
    _assert_near(ours.detach(), theirs.detach(), dtype)
    loss_of(ours).backward()
    loss_of(theirs).backward()
    for old, mine, other in zip(before, half.parameters(), exact.parameters(), strict=True):
        assert mine.dtype is dtype
        if fused:
            assert not torch.equal(mine, old)
            _assert_near(mine.detach(), other.detach(), dtype)
        else:
            assert mine.grad is not None
            assert other.grad is not None
            assert mine.grad.dtype is dtype
            _assert_near(mine.grad, other.grad, dtype)
