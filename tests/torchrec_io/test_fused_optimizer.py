"""``EmbeddingBagCollection.fused_optimizer``: a live KeyedOptimizer over what steps in the backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torchrec
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec import KeyedJaggedTensor
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward as torchrecs_apply
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage

from recemb import (
    ROBE,
    Dense,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    MixedDimension,
    QuotientRemainder,
    TensorTrain,
)
from recemb.errors import ConfigError
from recemb.optim import FusedUpdate

Apply = Callable[..., None]
TABLES = {
    "tt": TensorTrain(rank=2),
    "qr": QuotientRemainder(collisions=4),
    "robe_0": ROBE(compress_rate=2, block_size=4),
    "robe_1": ROBE(compress_rate=2, block_size=4),
    "md": MixedDimension(dim=2),
    "dense": Dense(),
}
KEYS = {
    *(f"embedding_bags.tt.core_{k}" for k in range(3)),
    *("embedding_bags.qr.q", "embedding_bags.qr.r", "embedding_bags.robe_0.array"),
    *("embedding_bags.md.e", "embedding_bags.md.p", "embedding_bags.dense.weight"),
}


def collection() -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name,
                num_embeddings=30,
                embedding_dim=8,
                feature_names=[f"f_{name}"],
                compression=compression,
            )
            for name, compression in TABLES.items()
        ]
    )


def attached(
    kind: type[torch.optim.Optimizer] = torch.optim.Adagrad,
    apply: Apply = _apply_optimizer_in_backward,
    **kw: Any,
) -> EmbeddingBagCollection:
    ebc = collection()
    apply(kind, ebc.parameters(), {"lr": 0.1} | kw)
    return ebc


def backward(ebc: EmbeddingBagCollection, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 3, (len(TABLES) * 5,), generator=generator)
    values = torch.randint(0, 30, (int(lengths.sum()),), generator=generator)
    batch = KeyedJaggedTensor(keys=[f"f_{name}" for name in TABLES], values=values, lengths=lengths)
    ebc(batch).values().square().sum().backward()


def weights(ebc: EmbeddingBagCollection) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in ebc.state_dict().items()}


def moved(ebc: EmbeddingBagCollection, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in ebc.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("apply", [_apply_optimizer_in_backward, torchrecs_apply])
def test_keys_and_parameters_are_the_collections(apply: Apply) -> None:
    ebc = attached(apply=apply)
    optimizer = ebc.fused_optimizer
    assert isinstance(optimizer, KeyedOptimizer)
    # The array that robe_0 and robe_1 share is there once.
    assert optimizer.params.keys() == KEYS
    assert all(optimizer.params[name] is parameter for name, parameter in ebc.named_parameters())
    assert optimizer.state_dict()["state"].keys() == KEYS
    assert len(optimizer.param_groups) == 1
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in ebc.parameters()}
    assert "lr: 0.1" in repr(optimizer)


def test_state_is_the_live_state() -> None:
    ebc = attached()
    optimizer = ebc.fused_optimizer
    backward(ebc)
    for parameter in ebc.parameters():
        (inner,) = parameter._in_backward_optimizers
        assert optimizer.state[parameter]["sum"] is inner.state[parameter]["sum"]
        assert float(optimizer.state[parameter]["step"]) == 1
        # torch's loading puts new tensors into the optimizer; a view must not keep the old ones.
        inner.load_state_dict(copy.deepcopy(inner.state_dict()))
        assert optimizer.state[parameter]["sum"] is inner.state[parameter]["sum"]
        inner.param_groups[0]["lr"] = 0.7
    assert optimizer.param_groups[0]["lr"] == 0.7


def test_step_and_zero_grad_change_nothing() -> None:
    ebc = attached(torch.optim.Adam)
    optimizer = ebc.fused_optimizer
    backward(ebc)
    before, state = weights(ebc), copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    optimizer.zero_grad()
    optimizer.init_state()
    assert moved(ebc, before) == set()
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in ebc.parameters())


def test_the_learning_rate_acts_on_the_next_backward() -> None:
    ebc = attached(torch.optim.SGD)
    before = weights(ebc)
    optimizer = ebc.fused_optimizer
    optimizer.param_groups[0]["lr"] = 0.0
    backward(ebc)
    assert moved(ebc, before) == set()
    optimizer.param_groups[0]["lr"] = 0.1
    backward(ebc)
    assert moved(ebc, before) == KEYS
    # Still one setting for all: the fused kernels would be left otherwise.
    assert all(FusedUpdate().of([p, q]) for p in ebc.parameters() for q in ebc.parameters())


def test_groups_are_those_of_the_calls_and_stay_so() -> None:
    ebc = collection()
    for table, rate in (("tt", 0.5), ("qr", 0.1), ("md", 0.5)):
        _apply_optimizer_in_backward(torch.optim.SGD, ebc.embedding_bags[table].parameters(), {"lr": rate})
    optimizer = ebc.fused_optimizer
    # Tables without an optimizer (robe, dense) are left out.
    assert optimizer.params.keys() == {key for key in KEYS if key.split(".")[1] in ("tt", "qr", "md")}
    assert [(group["lr"], len(group["params"])) for group in optimizer.param_groups] == [(0.5, 5), (0.1, 2)]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert len(ebc.fused_optimizer.param_groups) == 2


def test_a_torch_scheduler_drives_it() -> None:
    ebc, reference = attached(torch.optim.SGD), attached(torch.optim.SGD)
    reference.load_state_dict(ebc.state_dict())
    optimizer = ebc.fused_optimizer
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    for step in range(3):
        for parameter in reference.parameters():
            parameter._in_backward_optimizers[0].param_groups[0]["lr"] = 0.1 * 0.5**step
        backward(ebc, step)
        backward(reference, step)
        optimizer.step()
        schedule.step()
    assert moved(ebc, weights(reference)) == set()
    assert schedule.get_last_lr() == [pytest.approx(0.1 * 0.5**3)]


def _per_table(kind: type[torch.optim.Optimizer], **kw: Any) -> EmbeddingBagCollection:
    ebc = collection()
    for table in ebc.embedding_bags.values():
        _apply_optimizer_in_backward(kind, table.parameters(), {"lr": torch.tensor(0.1)} | kw)
    return ebc


def _each_loaded(kind: type[torch.optim.Optimizer], **kw: Any) -> EmbeddingBagCollection:
    ebc = attached(kind, lr=torch.tensor(0.1), **kw)
    backward(ebc)
    for parameter in ebc.parameters():
        (optimizer,) = parameter._in_backward_optimizers
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return ebc


def _loaded(kind: type[torch.optim.Optimizer], **kw: Any) -> EmbeddingBagCollection:
    ebc, other = (attached(kind, lr=torch.tensor(0.1), **kw) for _ in range(2))
    backward(other)
    ebc.fused_optimizer.load_state_dict(copy.deepcopy(other.fused_optimizer.state_dict()))
    return ebc


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("make", [_per_table, _each_loaded, _loaded])
def test_a_schedule_reaches_every_rate_that_is_a_tensor(
    make: Callable[..., EmbeddingBagCollection], momentum: float
) -> None:
    ebc = make(torch.optim.SGD, momentum=momentum)
    optimizer = ebc.fused_optimizer
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    for step in range(1, 3):
        optimizer.step()
        schedule.step()
        rates = [float(p._in_backward_optimizers[0].param_groups[0]["lr"]) for p in ebc.parameters()]
        assert rates == pytest.approx([0.1 * 0.5**step] * len(KEYS))
        # What is attached alike is one group in every view to come.
        assert len(ebc.fused_optimizer.param_groups) == 1


def test_a_rate_that_has_been_set_apart_stays_so() -> None:
    """Looking at a group, as a checkpoint does, changes nothing."""
    ebc = _per_table(torch.optim.SGD)
    optimizer = ebc.fused_optimizer
    *_, last = ebc.parameters()
    (own,) = last._in_backward_optimizers
    own.param_groups[0]["lr"].fill_(0.5)
    optimizer.state_dict()
    assert [float(group["lr"]) for group in optimizer.param_groups]
    assert float(own.param_groups[0]["lr"]) == 0.5


def test_loading_leaves_a_rate_that_is_a_tensor_where_it_is() -> None:
    ebc, other, rate = attached(torch.optim.SGD, momentum=0.9), collection(), torch.tensor(0.1)
    _apply_optimizer_in_backward(torch.optim.SGD, other.parameters(), {"lr": rate, "momentum": 0.9})
    backward(ebc)
    other.fused_optimizer.load_state_dict(copy.deepcopy(ebc.fused_optimizer.state_dict()))
    assert all(p._in_backward_optimizers[0].param_groups[0]["lr"] is rate for p in other.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_state_is_loaded_before_the_first_step_in_any_mode(
    mode: Callable[[], AbstractContextManager[None]],
) -> None:
    ebc, other = (attached(torch.optim.SGD, momentum=0.9) for _ in range(2))
    backward(ebc)
    other.load_state_dict(ebc.state_dict())
    with mode():
        other.fused_optimizer.load_state_dict(copy.deepcopy(ebc.fused_optimizer.state_dict()))
    backward(ebc, 1)
    backward(other, 1)
    assert moved(other, weights(ebc)) == set()


def test_torchrecs_warmup_drives_it_and_resumes() -> None:
    stages = [WarmupStage(WarmupPolicy.LINEAR, max_iters=4, value=0.0)]
    ebc = attached(torch.optim.SGD)
    before = weights(ebc)
    warmup = WarmupOptimizer(ebc.fused_optimizer, stages, lr=0.4)
    rates = []
    for step in range(3):
        backward(ebc, step)
        assert (moved(ebc, before) == set()) == (step == 0)
        warmup.step()
        rates.append(next(ebc.parameters())._in_backward_optimizers[0].param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.2, 0.3])
    other = attached(torch.optim.SGD)
    resumed = WarmupOptimizer(other.fused_optimizer, stages, lr=0.4)
    # torchrec makes the warmup's own state in its first step.
    resumed.step()
    resumed.load_state_dict(copy.deepcopy(warmup.state_dict()))
    assert other.fused_optimizer.param_groups[0]["lr"] == pytest.approx(0.3)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.SGD])
def test_state_exists_before_the_first_step(kind: type[torch.optim.Optimizer]) -> None:
    ebc, stepped = attached(kind), attached(kind)
    backward(stepped)
    names = {key: set(state) for key, state in stepped.fused_optimizer.state_dict()["state"].items()}
    state = ebc.fused_optimizer.state_dict()["state"]
    assert {key: set(value) for key, value in state.items()} == names
    assert not any(tensor.any() for value in state.values() for tensor in value.values())
    ebc.fused_optimizer.load_state_dict(copy.deepcopy(stepped.fused_optimizer.state_dict()))
    expected = stepped.fused_optimizer.state_dict()["state"]
    torch.testing.assert_close(ebc.fused_optimizer.state_dict()["state"], expected, rtol=0, atol=0)


def test_adam_whose_state_was_made_for_it_steps_like_one_whose_was_not() -> None:
    looked_at, plain = attached(torch.optim.Adam), attached(torch.optim.Adam)
    plain.load_state_dict(looked_at.state_dict())
    assert looked_at.fused_optimizer.state
    for step in range(2):
        backward(looked_at, step)
        backward(plain, step)
    assert moved(looked_at, weights(plain)) == set()


def test_combines_with_the_dense_layers_optimizer() -> None:
    def build() -> tuple[EmbeddingBagCollection, torch.nn.Linear, CombinedOptimizer]:
        ebc, layer = attached(torch.optim.Adam), torch.nn.Linear(3, 1)
        dense = KeyedOptimizerWrapper(
            dict(layer.named_parameters()), lambda p: torch.optim.Adagrad(p, lr=0.2)
        )
        return ebc, layer, CombinedOptimizer([("tables", ebc.fused_optimizer), ("layer", dense)])

    ebc, layer, both = build()
    assert both.params.keys() == {f"tables.{key}" for key in KEYS} | {"layer.weight", "layer.bias"}
    both.zero_grad()
    layer(torch.ones(2, 3)).sum().backward()
    backward(ebc)
    both.step()
    assert [group["lr"] for group in both.param_groups] == [0.1, 0.2]

    other, second, combined = build()
    other.load_state_dict(ebc.state_dict())
    second.load_state_dict(layer.state_dict())
    combined.load_state_dict(copy.deepcopy(both.state_dict()))
    torch.testing.assert_close(combined.state_dict(), both.state_dict(), rtol=0, atol=0)
    backward(ebc, 1)
    backward(other, 1)
    assert moved(other, weights(ebc)) == set()


def test_param_groups_can_be_saved_too() -> None:
    one, two = attached(torch.optim.SGD), attached(torch.optim.SGD)
    first, second = one.fused_optimizer, two.fused_optimizer
    first.save_param_groups(True)
    second.save_param_groups(True)
    first.param_groups[0]["lr"] = 0.03
    saved = copy.deepcopy(first.state_dict())
    assert set(saved["param_groups"][0]["params"]) == KEYS
    second.load_state_dict(saved)
    assert {p._in_backward_optimizers[0].param_groups[0]["lr"] for p in two.parameters()} == {0.03}


def test_nothing_attached_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"no optimizer is attached .*apply_optimizer_in_backward\("):
        _ = collection().fused_optimizer


def test_two_optimizers_on_one_parameter_are_refused() -> None:
    ebc = attached()
    _apply_optimizer_in_backward(torch.optim.SGD, [ebc.embedding_bags["qr"].q], {"lr": 0.1})
    with pytest.raises(ConfigError, match=r"embedding_bags\.qr\.q has 2 optimizers attached"):
        _ = ebc.fused_optimizer


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("embedding_bags.md.p"), r"nothing for embedding_bags\.md\.p"),
        (
            lambda state: state["embedding_bags.md.p"].pop("sum"),
            r"embedding_bags\.md\.p: .* keeps \['step', ",
        ),
        # One sum a row, as row-wise Adagrad has: copying it would broadcast over the columns.
        (
            lambda state: state["embedding_bags.md.p"].update(sum=torch.ones(2, 1)),
            r"shape \(2, 1\), not \(2, 8\)",
        ),
    ],
)
def test_a_state_that_does_not_fit_loads_nothing(spoil: Callable[[Any], object], message: str) -> None:
    ebc = attached()
    optimizer = ebc.fused_optimizer
    before, given = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    for state in given["state"].values():
        state["sum"].fill_(3.0)
    spoil(given["state"])
    with pytest.raises(ConfigError, match=message):
        optimizer.load_state_dict(given)
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


OTHERS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.RMSprop, {}),
    (torch.optim.Adadelta, {}),
]


@pytest.mark.parametrize(("kind", "settings"), OTHERS)
def test_another_optimizers_state_is_refused_before_the_first_step_too(
    kind: type[torch.optim.Optimizer], settings: dict[str, Any]
) -> None:
    saved, ebc = attached(torch.optim.Adagrad), attached(kind, **settings)
    backward(saved)
    optimizer = ebc.fused_optimizer
    with pytest.raises(ConfigError, match=r"holds \['step', 'sum'\] and this optimizer keeps"):
        optimizer.load_state_dict(saved.fused_optimizer.state_dict())
    assert not any(optimizer.state_dict()["state"].values())
    # The settings of the trial step are its own.
    assert all(p._in_backward_optimizers[0].param_groups[0]["params"] == [p] for p in ebc.parameters())


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.update(gone=state["embedding_bags.md.p"]), "holds gone, which is no parameter"),
        (
            lambda state: state["embedding_bags.md.p"].update(momentum_buffer=torch.ones(2, 1)),
            r"shape \(2, 1\), not \(2, 8\)",
        ),
    ],
)
def test_nothing_is_loaded_of_a_state_that_is_wrong_in_part(
    spoil: Callable[[Any], object], message: str, stepped: bool
) -> None:
    saved, ebc = (attached(torch.optim.SGD, momentum=0.9) for _ in range(2))
    backward(saved)
    if stepped:
        backward(ebc, 1)
    optimizer = ebc.fused_optimizer
    before, given = (copy.deepcopy(one.state_dict()) for one in (optimizer, saved.fused_optimizer))
    spoil(given["state"])
    with pytest.raises(ConfigError, match=message):
        optimizer.load_state_dict(given)
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


def test_torchrec_may_change_the_callers_kwargs() -> None:
    ebc, settings = collection(), {"lr": 0.1}
    _apply_optimizer_in_backward(torchrec.optim.RowWiseAdagrad, ebc.parameters(), settings)
    # What torchrec's sharded modules do to the dictionary that they find on the parameters.
    settings["optimizer"] = "EXACT_ROWWISE_ADAGRAD"
    settings["learning_rate"] = settings.pop("lr")
    before = weights(ebc)
    assert ebc.fused_optimizer.param_groups[0]["lr"] == 0.1
    backward(ebc)
    assert moved(ebc, before) == KEYS


def test_a_dummy_step_of_torchrecs_leaves_no_gradient_behind() -> None:
    """``CombinedOptimizer`` does not ask its members to make their state."""
    made = collection()
    _apply_optimizer_in_backward(torch.optim.Adagrad, made.parameters(), {"lr": 0.1})
    combined = CombinedOptimizer([made.fused_optimizer])
    combined.init_state()
    assert all(parameter.grad is not None for parameter in made.parameters())
    combined.zero_grad()
    assert all(parameter.grad is None for parameter in made.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_made_in_an_evaluation_can_be_trained_with(dtype: torch.dtype) -> None:
    made = collection().to(dtype)
    _apply_optimizer_in_backward(torch.optim.Adam, made.parameters(), {"lr": 0.1, "weight_decay": 0.1})
    with torch.inference_mode():
        assert made.fused_optimizer.param_groups[0]["lr"] == 0.1
    keys = [f"f_{name}" for name in TABLES]
    batch = KeyedJaggedTensor(
        keys=keys, values=torch.arange(len(keys)), lengths=torch.ones(len(keys), dtype=torch.int64)
    )
    before = [parameter.detach().clone() for parameter in made.parameters()]
    made(batch).values().sum().backward()
    assert all(not torch.equal(a, b) for a, b in zip(before, made.parameters(), strict=True))
