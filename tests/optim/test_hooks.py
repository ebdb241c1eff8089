"""Without a registered hook nothing steps in the backward: the gradient is left, as in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.distributed.optim.apply_optimizer_in_backward import param_to_optim_hook_handle_map

from recemb import EmbeddingBagCollection
from tests.optim.ddp_worker import CASES, Case
from tests.optim.test_fused_update import COMPRESSIONS, OPTIMIZERS, _batches, _collection, _loss
from tests.sharding.shared import Found, of_case, of_ranks

FIRST = 2  # steps that are taken in the backward


def _remove_hooks(collection: EmbeddingBagCollection, every: int = 1) -> None:
    for parameter in list(collection.parameters())[::every]:
        for handle in param_to_optim_hook_handle_map[parameter]:
            handle.remove()


def _step(collection: EmbeddingBagCollection) -> None:
    for parameter in collection.parameters():
        (optimizer,) = parameter._in_backward_optimizers
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("register", [False, True], ids=["never", "removed"])
@pytest.mark.parametrize("method", COMPRESSIONS)
@pytest.mark.parametrize("name", [*OPTIMIZERS, "adam"])
def test_gradients_are_left_without_a_hook(name: str, method: str, register: bool) -> None:
    kind, settings = OPTIMIZERS.get(name, (torch.optim.Adam, {"lr": 0.02, "eps": 1e-3}))
    ours, fused = _collection(COMPRESSIONS[method]), _collection(COMPRESSIONS[method])
    apply_optimizer_in_backward(kind, fused.parameters(), dict(settings))
    apply_optimizer_in_backward(kind, ours.parameters(), dict(settings), register_hook=register)
    for at, batch in enumerate(_batches()):
        if register and at == FIRST:
            _remove_hooks(ours)
        before = [parameter.detach().clone() for parameter in ours.parameters()]
        _loss(ours, batch).backward()
        if not register or at >= FIRST:
            for parameter, old in zip(ours.parameters(), before, strict=True):
                assert torch.equal(parameter, old)
                assert parameter.grad is not None
            _step(ours)
        _loss(fused, batch).backward()
        for mine, stepped in zip(ours.parameters(), fused.parameters(), strict=True):
            torch.testing.assert_close(mine, stepped, rtol=1e-5, atol=1e-6)
            assert mine.grad is None


@pytest.mark.parametrize("method", ["tt", "mult", "md"])
def test_parameters_with_a_hook_are_stepped_beside_those_without(method: str) -> None:
    ours, torchs = _collection(COMPRESSIONS[method]), _collection(COMPRESSIONS[method])
    apply_optimizer_in_backward(torch.optim.SGD, ours.parameters(), {"lr": 0.5})
    (batch, *_) = _batches()
    _loss(ours, batch)  # What is remembered of a look-up holds until hooks are removed.
    _remove_hooks(ours, every=2)
    before = [parameter.detach().clone() for parameter in ours.parameters()]
    _loss(ours, batch).backward()
    _loss(torchs, batch).backward()
    for k, (mine, old, other) in enumerate(zip(ours.parameters(), before, torchs.parameters(), strict=True)):
        assert other.grad is not None
        if k % 2:
            assert mine.grad is None
            torch.testing.assert_close(mine.detach(), old - 0.5 * other.grad, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(mine, old)
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return of_ranks("tests.optim.ddp_worker", 2, tmp_path_factory.mktemp("ddp") / "2")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_replicas_under_ddp_equal_one_process(replicas: list[Found], case: Case) -> None:
    found: list[dict[str, Any]] = of_case(replicas, str(case))
    for rank in found:
        assert rank["apart"] == 0, "the replicas differ"
        assert rank["moved"] > 1e-2
        assert rank["off"] <= 1e-6
        assert rank["left"] == []
