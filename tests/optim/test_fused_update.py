"""Optimizers attached by apply_optimizer_in_backward: the fused step equals torch's on the same batches."""

from __future__ import annotations

import copy
import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torchrec
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import KeyedJaggedTensor

from recemb import (
    ROBE,
    Compression,
    Dense,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    MixedDimension,
    QuotientRemainder,
    TensorTrain,
)
from recemb.errors import ConfigError
from recemb.optim import FusedUpdate

ROWS = {"a": 4000, "b": 90}
STEPS, BATCH = 6, 40
# Rates at which six steps move the weights by far more than the tolerance.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.5}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05, "eps": 1e-8}),
    "adagrad_decay": (torch.optim.Adagrad, {"lr": 0.05, "lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    "rowwise_adagrad": (torchrec.optim.RowWiseAdagrad, {"lr": 0.05, "eps": 1e-8}),
}


COMPRESSIONS: dict[str, Compression] = {
    "tt": TensorTrain(rank=8),
    "mult": QuotientRemainder(collisions=30),
    "add": QuotientRemainder(collisions=30, operation="add"),
    "concat": QuotientRemainder(collisions=30, operation="concat"),
    "md": MixedDimension(dim=3),
    "robe": ROBE(compress_rate=20, block_size=8),
    "dense": Dense(),
}


def _collection(compression: Compression = COMPRESSIONS["tt"]) -> EmbeddingBagCollection:
    torch.manual_seed(0)
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name,
                num_embeddings=rows,
                embedding_dim=16,
                # Feature c shares table b: its slices must be updated once, not twice.
                feature_names=[name] if name == "a" else ["b", "c"],
                weight_init_min=-1.0,
                weight_init_max=1.0,
                compression=compression,
            )
            for name, rows in ROWS.items()
        ]
    )


def _batches(seed: int = 1) -> list[KeyedJaggedTensor]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(STEPS):
        lengths = torch.randint(0, 4, (3 * BATCH,), generator=generator)
        parts = [
            # The first rows only, so that most slices are never touched.
            torch.randint(0, rows // 3, (int(part.sum()),), generator=generator)
            for rows, part in zip((ROWS["a"], ROWS["b"], ROWS["b"]), lengths.split(BATCH), strict=True)
        ]
        batches.append(KeyedJaggedTensor(keys=["a", "b", "c"], values=torch.cat(parts), lengths=lengths))
    return batches


def _loss(collection: EmbeddingBagCollection, batch: KeyedJaggedTensor) -> Tensor:
    values = collection(batch).values()
    return (values - torch.linspace(-1, 1, values.shape[1])).square().mean()


@pytest.mark.parametrize("method", COMPRESSIONS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_equals_torch(name: str, method: str) -> None:
    kind, settings = OPTIMIZERS[name]
    ours, torchs = _collection(COMPRESSIONS[method]), _collection(COMPRESSIONS[method])
    apply_optimizer_in_backward(kind, ours.parameters(), dict(settings))
    optimizer = kind(torchs.parameters(), **settings)
    start = [parameter.detach().clone() for parameter in ours.parameters()]
    for batch in _batches():
        _loss(ours, batch).backward()
        optimizer.zero_grad()
        _loss(torchs, batch).backward()
        optimizer.step()
        assert all(parameter.grad is None for parameter in ours.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(ours.parameters(), start, strict=True))
    for mine, theirs in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        (attached,) = mine._in_backward_optimizers
        expected = optimizer.state[theirs]
        assert attached.state[mine].keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(attached.state[mine][key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("method", ["tt", "mult", "add", "concat", "md"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_without_an_optimizer_gets_its_gradient_beside_stepped_ones(
    name: str, method: str, first: int
) -> None:
    kind, settings = OPTIMIZERS[name]
    ours, torchs = _collection(COMPRESSIONS[method]), _collection(COMPRESSIONS[method])
    tables = [list(table.parameters()) for table in ours.embedding_bags.values()]
    stepped = [p for table in tables for p in table[first::2]]
    free = [p for table in tables for p in table[1 - first :: 2]]
    apply_optimizer_in_backward(kind, stepped, dict(settings))
    fired = []
    for parameter in stepped:
        parameter._in_backward_optimizers[0].register_step_post_hook(lambda *_: fired.append(1))
    mine, theirs = kind(free, **settings), kind(torchs.parameters(), **settings)
    start = [parameter.detach().clone() for parameter in ours.parameters()]
    for batch in _batches():
        mine.zero_grad()
        _loss(ours, batch).backward()
        assert all(parameter.grad is None for parameter in stepped)
        assert all(parameter.grad is not None for parameter in free)
        mine.step()
        theirs.zero_grad()
        _loss(torchs, batch).backward()
        theirs.step()
    assert not fired, "the kernel steps; torch's hook would need a gradient of the parameter's size"
    for before, own, other in zip(start, ours.parameters(), torchs.parameters(), strict=True):
        assert not torch.equal(before, own)
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_states_are_looked_at_again_when_parameters_have_changed() -> None:
    """A module that is moved keeps its parameters and states as objects, whatever becomes of their memory."""
    collection = _collection(COMPRESSIONS["tt"])
    apply_optimizer_in_backward(torch.optim.Adagrad, collection.parameters(), {"lr": 0.1})
    (batch, *_) = _batches()
    _loss(collection, batch).backward()
    for parameter in collection.parameters():
        (optimizer,) = parameter._in_backward_optimizers
        optimizer.state[parameter]["sum"].data = optimizer.state[parameter]["sum"].double()
    collection.requires_grad_(False)
    _loss(collection, batch)
    collection.requires_grad_(True)
    with pytest.raises(ConfigError, match="sum"):
        _loss(collection, batch).backward()


def test_a_rate_of_every_step_asks_the_tables_nothing_anew() -> None:
    ours, torchs = _collection(COMPRESSIONS["tt"]), _collection(COMPRESSIONS["tt"])
    apply_optimizer_in_backward(torch.optim.SGD, ours.parameters(), {"lr": 0.5})
    optimizer = torch.optim.SGD(torchs.parameters(), lr=0.5)
    first = next(iter(ours.parameters()))
    # Rates of a table that differ among its parameters are torch's to apply.
    rates = [(0.5, 0.5), (0.4, 0.4), (0.3, 0.3), (0.2, 0.1), (0.1, 0.1)]
    for batch, (rate, own) in zip(_batches(), rates, strict=False):
        for parameter in ours.parameters():
            (attached,) = parameter._in_backward_optimizers
            attached.param_groups[0]["lr"] = own if parameter is first else rate
        with patch.object(FusedUpdate, "of", autospec=True, side_effect=FusedUpdate.of) as asked:
            _loss(ours, batch).backward()
        assert bool(asked.call_count) == (rate == 0.5 or rate != own or rate == 0.1)
        optimizer.zero_grad()
        _loss(torchs, batch).backward()
        for mine, theirs in zip(ours.parameters(), torchs.parameters(), strict=True):
            assert theirs.grad is not None
            with torch.no_grad():
                theirs -= (own if mine is first else rate) * theirs.grad
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_a_rate_that_is_a_tensor_is_read_in_every_step(name: str) -> None:
    kind, settings = OPTIMIZERS[name]
    ours, torchs = _collection(COMPRESSIONS["tt"]), _collection(COMPRESSIONS["tt"])
    rates = torch.tensor(0.1), torch.tensor(0.1)
    apply_optimizer_in_backward(kind, ours.parameters(), {**settings, "lr": rates[0]})
    optimizer = kind(torchs.parameters(), **{**settings, "lr": rates[1]})
    for batch in _batches():
        _loss(ours, batch).backward()
        optimizer.zero_grad()
        _loss(torchs, batch).backward()
        optimizer.step()
        for rate in rates:
            rate.mul_(0.3)
        for mine, theirs in zip(ours.parameters(), torchs.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["tt", "mult", "md"])
def test_rates_that_are_tensors_and_equal_at_first_may_part(method: str) -> None:
    ours, torchs = _collection(COMPRESSIONS[method]), _collection(COMPRESSIONS[method])
    for parameter in ours.parameters():
        apply_optimizer_in_backward(torch.optim.SGD, [parameter], {"lr": torch.tensor(0.5)})
    optimizers = [torch.optim.SGD([parameter], lr=0.5) for parameter in torchs.parameters()]
    for step, batch in enumerate(_batches()):
        for k, (mine, theirs) in enumerate(zip(ours.parameters(), optimizers, strict=True)):
            # Apart after two steps, and together again after four.
            rate = (0.5, 0.1 * (1 + k), 0.3)[step // 2]
            mine._in_backward_optimizers[0].param_groups[0]["lr"].fill_(rate)
            theirs.param_groups[0]["lr"] = rate
            theirs.zero_grad()
        _loss(ours, batch).backward()
        _loss(torchs, batch).backward()
        for theirs in optimizers:
            theirs.step()
        for mine, other in zip(ours.parameters(), torchs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_a_step_is_worked_out_once_whatever_tensor_stands_for_what_is_left() -> None:
    (table, *_) = _collection(COMPRESSIONS["md"]).embedding_bags.values()
    rows, projection = table.parameters()
    apply_optimizer_in_backward(torch.optim.SGD, [rows], {"lr": 0.1})
    update = FusedUpdate()
    step = update.of([rows, projection])
    assert step is not None
    assert step.left == {1}
    assert update.of([rows, projection.view_as(projection)]) is step
    assert update.of([projection, rows]) is not step


@pytest.mark.parametrize("method", ["tt", "mult", "dense"])
def test_adam_moves_touched_rows_by_adams_formula_and_no_others(method: str) -> None:
    ours, oracle = _collection(COMPRESSIONS[method]), _collection(COMPRESSIONS[method])
    lr, eps, beta1, beta2 = 0.02, 1e-8, 0.9, 0.999
    apply_optimizer_in_backward(torch.optim.Adam, ours.parameters(), {"lr": lr, "eps": eps})
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in oracle.parameters()]
    for step, batch in enumerate(_batches(), start=1):
        _loss(ours, batch).backward()
        grads = torch.autograd.grad(_loss(oracle, batch), list(oracle.parameters()))
        with torch.no_grad():
            for parameter, grad, (first, second) in zip(oracle.parameters(), grads, moments, strict=True):
                for row in grad.any(dim=1).nonzero().flatten():
                    first[row] = beta1 * first[row] + (1 - beta1) * grad[row]
                    second[row] = beta2 * second[row] + (1 - beta2) * grad[row] ** 2
                    root = (second[row] / (1 - beta2**step)).sqrt() + eps
                    parameter[row] -= lr / (1 - beta1**step) * first[row] / root
    # A gradient of a few ulps has a sign of its own on each side, and Adam takes a full step on signs.
    for mine, theirs in zip(ours.parameters(), oracle.parameters(), strict=True):
        close = torch.isclose(mine, theirs, rtol=1e-4, atol=1e-5)
        assert float(close.float().mean()) > 0.999


def test_learning_rate_schedule_acts_on_the_fused_step() -> None:
    ours = _collection()
    apply_optimizer_in_backward(torch.optim.SGD, ours.parameters(), {"lr": 0.5})
    for parameter in ours.parameters():
        parameter._in_backward_optimizers[0].param_groups[0]["lr"] = 0.0
    before = copy.deepcopy(ours.state_dict())
    _loss(ours, _batches()[0]).backward()
    assert all(torch.equal(before[key], value) for key, value in ours.state_dict().items())


def test_state_dict_of_the_optimizer_resumes_the_run() -> None:
    kind, settings = OPTIMIZERS["rowwise_adagrad"]
    straight, resumed = _collection(), _collection()
    apply_optimizer_in_backward(kind, straight.parameters(), dict(settings))
    batches = _batches()
    for batch in batches[:3]:
        _loss(straight, batch).backward()
    resumed.load_state_dict(straight.state_dict())
    apply_optimizer_in_backward(kind, resumed.parameters(), dict(settings))
    for old, new in zip(straight.parameters(), resumed.parameters(), strict=True):
        new._in_backward_optimizers[0].load_state_dict(
            copy.deepcopy(old._in_backward_optimizers[0].state_dict())
        )
    for batch in batches[3:]:
        _loss(straight, batch).backward()
        _loss(resumed, batch).backward()
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Adagrad, {"lr": 0.1, "weight_decay": 0.1}),
        (torch.optim.RMSprop, {"lr": 0.1}),
    ],
)
def test_what_cannot_be_fused_steps_through_torchs_hook(
    kind: type[torch.optim.Optimizer], settings: dict[str, Any]
) -> None:
    ours, torchs = _collection(), _collection()
    apply_optimizer_in_backward(kind, ours.parameters(), dict(settings))
    assert FusedUpdate().of(list(ours.parameters())) is None
    optimizer = kind(torchs.parameters(), **settings)
    for batch in _batches():
        _loss(ours, batch).backward()
        optimizer.zero_grad()
        _loss(torchs, batch).backward()
        optimizer.step()
    for mine, theirs in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_tables_with_different_optimizers_each_take_their_own_step() -> None:
    ours, torchs = _collection(), _collection()
    optimizers = []
    for table, rate in (("a", 0.5), ("b", 0.1)):
        apply_optimizer_in_backward(torch.optim.SGD, ours.embedding_bags[table].parameters(), {"lr": rate})
        optimizers.append(torch.optim.SGD(torchs.embedding_bags[table].parameters(), lr=rate))
    for batch in _batches():
        _loss(ours, batch).backward()
        _loss(torchs, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for mine, theirs in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_forward_alone_changes_nothing() -> None:
    ours = _collection()
    apply_optimizer_in_backward(torch.optim.Adagrad, ours.parameters(), {"lr": 0.5})
    before = copy.deepcopy(ours.state_dict())
    for batch in _batches():
        _loss(ours, batch)
    assert all(torch.equal(before[key], value) for key, value in ours.state_dict().items())
    for parameter in ours.parameters():
        assert float(parameter._in_backward_optimizers[0].state[parameter]["step"]) == 0


@pytest.mark.parametrize("method", ["tt", "mult", "md", "robe", "dense"])
def test_no_gradient_of_a_large_parameter_is_made(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = _collection(COMPRESSIONS[method])
    apply_optimizer_in_backward(torch.optim.SGD, ours.parameters(), {"lr": 0.1})
    made: list[torch.Size] = []
    zeros_like = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda x, **kw: made.append(x.shape) or zeros_like(x, **kw))
    for parameter in ours.parameters():
        # A hook fires only when a gradient reaches the parameter; md's small projection has one.
        parameter.register_hook(lambda grad: made.append(grad.shape))
    _loss(ours, _batches()[0]).backward()
    assert all(math.prod(shape) <= 3 * 16 for shape in made)


def test_state_that_cannot_be_written_in_place_is_refused_before_any_weight_changes() -> None:
    ebc = _collection()
    apply_optimizer_in_backward(torch.optim.Adagrad, ebc.parameters(), {"lr": 0.1})
    parameters = list(ebc.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    last = parameters[-1]
    state = last._in_backward_optimizers[0].state[last]  # type: ignore[attr-defined] # torch's own name
    state["sum"] = state["sum"].double()
    pooled = ebc(_batches()[0]).values()
    with pytest.raises(ConfigError, match=r"float64.*needs contiguous float32"):
        pooled.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))


def test_a_parameter_that_is_not_contiguous_is_stepped_too() -> None:
    ours, twin = _collection(), _collection()
    for ebc in (ours, twin):
        apply_optimizer_in_backward(torch.optim.SGD, ebc.parameters(), {"lr": 0.001})
    for parameter in ours.parameters():
        parameter.data = parameter.detach().T.contiguous().T
    assert not next(ours.parameters()).is_contiguous()
    for batch in _batches():
        ours(batch).values().sum().backward()
        twin(batch).values().sum().backward()
    for first, second in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
