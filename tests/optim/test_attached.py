"""Whatever is attached, and whatever a kernel can step of it: the same rule moves the same rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchrec
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import KeyedJaggedTensor

from recemb import EmbeddingBagCollection
from recemb.errors import ConfigError
from recemb_kernels import native
from tests.optim.test_fused_update import COMPRESSIONS, _batches, _collection, _loss

# An epsilon beyond the rounding of gradients, which Adam would blow up to full steps.
ADAM = {"lr": 0.02, "eps": 1e-3}


def _trained(made: EmbeddingBagCollection) -> list[torch.Tensor]:
    for batch in _batches():
        _loss(made, batch).backward()
    return [parameter.detach() for parameter in made.parameters()]


def _close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("placeholder", "given", "kind", "settings"),
    [
        (torchrec.optim.SGD, {"lr": 0.5}, torch.optim.SGD, {"lr": 0.5}),
        (torchrec.optim.SGD, {"learning_rate": 0.5, "max_gradient": None}, torch.optim.SGD, {"lr": 0.5}),
        (torchrec.optim.Adagrad, {"lr": 0.05}, torch.optim.Adagrad, {"lr": 0.05, "eps": 1e-8}),
        (torchrec.optim.Adam, {"lr": 0.02}, torch.optim.Adam, {"lr": 0.02}),
        (
            torchrec.optim.Adam,
            {"lr": 0.02, "beta1": 0.8, "eps": 1e-3, "weight_decay": 0.0},
            torch.optim.Adam,
            {"lr": 0.02, "betas": (0.8, 0.999), "eps": 1e-3},
        ),
    ],
)
def test_names_that_torchrec_has_for_fbgemm_are_torchs_optimizers(
    placeholder: Any, given: dict[str, Any], kind: Any, settings: dict[str, Any]
) -> None:
    found = []
    for attached, arguments in ((placeholder, given), (kind, settings)):
        made = _collection()
        apply_optimizer_in_backward(attached, made.parameters(), dict(arguments))
        made.fused_optimizer  # noqa: B018 # asks before any look-up has
        found.append(_trained(made))
        (optimizer,) = next(made.parameters())._in_backward_optimizers
        assert type(optimizer) is kind
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (
            torchrec.optim.LAMB,
            {"lr": 0.1},
            r"torchrec\S*\.LAMB, attached .* cannot step outside of fbgemm; use",
        ),
        (
            torchrec.optim.Adam,
            {"weight_decay": 0.1},
            r"has \{'weight_decay': 0.1\}.* leave out all but lr, eps",
        ),
        (torchrec.optim.SGD, {"max_gradient": 1.0}, r"has \{'max_gradient': 1.0\}.* leave out all but lr"),
    ],
)
def test_what_fbgemm_alone_can_do_is_refused_before_anything_changes(
    kind: Any, given: dict[str, Any], said: str
) -> None:
    made = _collection()
    before = [parameter.detach().clone() for parameter in made.parameters()]
    apply_optimizer_in_backward(kind, made.parameters(), given)
    with pytest.raises(ConfigError, match=said):
        made(_batches()[0])
    assert all(torch.equal(a, b) for a, b in zip(before, made.parameters(), strict=True))


@pytest.mark.parametrize("method", COMPRESSIONS)
def test_adam_is_lazy_without_a_kernel_too(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for unavailable in ({}, dict.fromkeys(native.OPS, "no compiler in this test")):
        monkeypatch.setattr(native, "_unavailable", unavailable)
        made = _collection(COMPRESSIONS[method])
        start = [parameter.detach().clone() for parameter in made.parameters()]
        apply_optimizer_in_backward(torch.optim.Adam, made.parameters(), dict(ADAM))
        found.append(_trained(made))
        assert all(
            p._in_backward_optimizers[0].state[p]["step"] == len(_batches()) for p in made.parameters()
        )
        assert not any(torch.equal(a, b) for a, b in zip(start, found[-1], strict=True))
    _close(*found)


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("method", ["tt", "mult", "concat", "md"])
def test_adam_is_lazy_where_rates_differ_within_a_table(method: str, scheduled: bool) -> None:
    """No kernel steps parameters at several rates. Schedulers put a step of their own before Adam's."""
    made, schedulers = _collection(COMPRESSIONS[method]), []
    apply_optimizer_in_backward(torch.optim.Adam, made.parameters(), dict(ADAM))
    for table in made.embedding_bags.values():
        for k, parameter in enumerate(table.parameters()):
            (optimizer,) = parameter._in_backward_optimizers
            optimizer.param_groups[0]["lr"] *= 1 + k
            if scheduled:
                schedulers.append(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    _loss(made, _batches()[0]).backward()
    for scheduler in schedulers:
        scheduler.step()
    # Rows that have moved, and would be moved on by dense Adam.
    before = [parameter.detach().clone() for parameter in made.parameters()]
    one = torch.ones(3, dtype=torch.int64)
    _loss(made, KeyedJaggedTensor(keys=["a", "b", "c"], values=0 * one, lengths=one)).backward()
    for (name, parameter), old in zip(made.named_parameters(), before, strict=True):
        (optimizer,) = parameter._in_backward_optimizers
        assert optimizer.state[parameter]["step"] == 2
        if not name.endswith(".p"):  # every batch moves all of a projection
            assert (parameter.detach() != old).any(dim=1).sum() == 1


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adagrad, torchrec.optim.RowWiseAdagrad])
@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("method", ["tt", "mult", "add", "concat", "md"])
def test_a_frozen_parameter_leaves_the_others_their_fused_step(method: str, frozen: int, kind: Any) -> None:
    found, reached = [], []
    for freeze in (False, True):
        made = _collection(COMPRESSIONS[method])
        for table in made.embedding_bags.values():
            parameters = list(table.parameters())
            apply_optimizer_in_backward(kind, parameters, {"lr": 0.02, "eps": 1e-3})
            if freeze:
                parameters[frozen].requires_grad_(False)
            for parameter in parameters:
                if parameter.requires_grad:
                    parameter.register_hook(lambda grad: reached.append(grad.shape))
        start = [[p.detach().clone() for p in table.parameters()] for table in made.embedding_bags.values()]
        _loss(made, _batches()[0]).backward()
        found.append([[p.detach() for p in table.parameters()] for table in made.embedding_bags.values()])
    assert not reached, "a gradient has been made, so no kernel has stepped"
    for whole, partly, before in zip(*found, start, strict=True):
        for k, (mine, theirs, old) in enumerate(zip(whole, partly, before, strict=True)):
            assert torch.equal(theirs, old if k == frozen else mine)
            assert not torch.equal(mine, old)


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.Adam, torchrec.optim.RowWiseAdagrad])
@pytest.mark.parametrize("method", ["tt", "mult", "robe", "dense"])
def test_an_eps_that_is_0_in_float16_is_refused_before_weights_become_nan(kind: Any, method: str) -> None:
    made = _collection(COMPRESSIONS[method]).half()
    apply_optimizer_in_backward(kind, made.parameters(), {"lr": 0.01})
    before = [parameter.detach().clone() for parameter in made.parameters()]
    batch = _batches()[0]
    said = r"table 'a': \w+ is torch.float16, in which \w+'s eps=1e-\d+ is 0.*eps=1e-4, or .*DataType.BF16"
    with pytest.raises(ConfigError, match=said):
        made(batch)
    assert all(map(torch.equal, made.parameters(), before))
    with torch.no_grad():
        made(batch)
    for parameter in made.parameters():
        parameter._in_backward_optimizers[0].param_groups[0]["eps"] = 1e-4
    assert all(bool(torch.isfinite(parameter).all()) for parameter in _trained(made))
    assert not all(map(torch.equal, made.parameters(), before))


class Wide(torch.optim.Optimizer):
    """Adam's rule without a bias correction, whose state and arithmetic are float32 whatever is stepped."""

    def __init__(self, params: Any, lr: float, eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override] # torch's
        for group in self.param_groups:
            for parameter in group["params"]:
                grad, state = parameter.grad.float(), self.state[parameter]
                square = state.setdefault("square", torch.zeros_like(grad)).lerp_(grad * grad, 0.1)
                parameter.sub_((group["lr"] * grad / (square.sqrt() + group["eps"])).to(parameter.dtype))


class Narrow(torch.optim.Adagrad):
    """A user's own by its module, which computes as torch's does."""


@pytest.mark.parametrize("kind", [Narrow, torch.optim.RMSprop, torch.optim.AdamW])
def test_an_eps_that_is_0_in_float16_is_refused_of_any_optimizer_that_divides_by_it(kind: Any) -> None:
    made = _collection().half()
    apply_optimizer_in_backward(kind, made.parameters(), {"lr": 0.01, "eps": 1e-8})
    with pytest.raises(ConfigError, match=rf"{kind.__name__}'s eps=1e-08 is 0"):
        made(_batches()[0])


def test_of_several_optimizers_the_one_that_divides_by_0_is_named() -> None:
    made = _collection().half()
    for kind in (Wide, torch.optim.Adagrad):
        apply_optimizer_in_backward(kind, made.parameters(), {"lr": 0.01})
    with pytest.raises(ConfigError, match="Adagrad's eps=1e-10 is 0"):
        made(_batches()[0])


@pytest.mark.parametrize(
    ("dtype", "kind", "settings"),
    [
        (torch.float16, Wide, {}),
        (torch.bfloat16, torch.optim.Adagrad, {}),
        (torch.bfloat16, torch.optim.Adam, {}),
        (torch.float16, torch.optim.SGD, {}),
        (torch.float16, torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
    ],
)
def test_what_half_precision_can_be_trained_with_is_taken(
    dtype: torch.dtype, kind: Any, settings: dict[str, Any]
) -> None:
    made = _collection().to(dtype)
    apply_optimizer_in_backward(kind, made.parameters(), {"lr": 0.01, **settings})
    assert all(bool(torch.isfinite(parameter).all()) for parameter in _trained(made))


def test_a_frozen_table_in_float16_is_looked_up_whatever_is_attached() -> None:
    made = _collection().half()
    apply_optimizer_in_backward(torch.optim.Adagrad, made.parameters(), {"lr": 0.01})
    made.requires_grad_(False)
    assert bool(torch.isfinite(made(_batches()[0]).values()).all())
