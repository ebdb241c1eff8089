"""The tables step in their backward, equal to plain torch, and only after every gradient has been checked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchrec
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.datasets.utils import Batch

import recemb
from recemb.errors import NonFiniteError
from recemb.models import dlrm
from recemb.optim.adam import LazyAdam
from recemb.training.config import RunConfig
from recemb.training.guards import Place
from recemb.training.interrupt import StopRequest
from recemb.training.loop import Trainer
from recemb.training.setup import build_model, build_optimizer, choose_tables, make_batches, open_log
from recemb.training.table_step import TableStep, find_collection
from recemb_kernels import native

MakeConfig = Callable[..., RunConfig]
RATES = {"dense": None, "tt": 5, "qr": 2, "robe": 20, "md": 3}
OPTIMIZERS = ["sgd", "adagrad", "rowwise_adagrad", "adam"]
# Every optimizer with one method, and every method with one optimizer.
PAIRS = [(optimizer, "tt") for optimizer in OPTIMIZERS] + [
    ("adam", method) for method in RATES if method != "tt"
]
PLACE = Place("train", 0, 0)
INF = float("inf")


def make_trainer(config: RunConfig) -> Trainer:
    log = open_log(config)
    model = build_model(config, log, choose_tables(config, log))
    optimizer = build_optimizer(config, model)
    return Trainer(
        config, model, optimizer, make_batches(config, log), StopRequest(), lambda evaluation: None
    )


def batches(trainer: Trainer) -> Iterator[Batch]:
    return trainer._batches.train(0)


def everything(trainer: Trainer) -> dict[str, Any]:
    return copy.deepcopy({"model": trainer._model.state_dict(), "optimizer": trainer._optimizer.state_dict()})


def assert_same(trainer: Trainer, before: dict[str, Any]) -> None:
    torch.testing.assert_close(everything(trainer), before, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_unavailable", dict.fromkeys(native.OPS, "no compiler in this test"))


def overflow_in_dense_layers(model: Any) -> str:
    parameter = model.over_arch.model[0]._mlp[0]._linear.weight
    parameter.register_hook(lambda grad: grad + INF)
    return r"over_arch\.\S*weight is NaN or infinite"


def overflow_in_pooled_rows(model: Any) -> str:
    def spoil(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[5, 3, 2] = INF
        return grad

    def attach(module: nn.Module, args: object, output: Tensor) -> None:
        output.register_hook(spoil)

    model.sparse_arch.register_forward_hook(attach)
    return r"gradient of the pooled rows of cat_3[ ,].*is NaN or infinite although the loss is finite"


def overflow_in_table(model: Any) -> str:
    name, parameter = next(find_collection(model)[1].named_parameters())
    parameter.register_hook(lambda grad: grad - INF)
    return f"gradient of {name} is NaN or infinite"


@pytest.mark.parametrize("overflow", [overflow_in_dense_layers, overflow_in_pooled_rows])
@pytest.mark.parametrize(("optimizer", "method"), PAIRS)
def test_an_overflowing_gradient_changes_no_weight_and_no_state(
    make_config: MakeConfig, optimizer: str, method: str, overflow: Callable[[Any], str]
) -> None:
    trainer = make_trainer(make_config(optimizer=optimizer, method=method, compress_rate=RATES[method]))
    data = batches(trainer)
    trainer._train_step(next(data), PLACE)
    message = overflow(trainer._model)
    before = everything(trainer)
    with pytest.raises(NonFiniteError, match=message):
        trainer._train_step(next(data), PLACE)
    assert_same(trainer, before)


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("overflow", [overflow_in_dense_layers, overflow_in_pooled_rows, overflow_in_table])
@pytest.mark.parametrize(("optimizer", "method"), PAIRS)
def test_nor_does_it_without_a_compiler(
    make_config: MakeConfig, optimizer: str, method: str, overflow: Callable[[Any], str]
) -> None:
    test_an_overflowing_gradient_changes_no_weight_and_no_state(make_config, optimizer, method, overflow)


@pytest.mark.parametrize("interaction", ["original", "dcn"])
def test_a_real_overflow(make_config: MakeConfig, interaction: str) -> None:
    """Two layers of weights 1e22 over tiny activations: the loss is finite, the gradient below them 1e44."""
    trainer = make_trainer(make_config(optimizer="adagrad", interaction_type=interaction))
    model: Any = trainer._model
    with torch.no_grad():
        for parameter in find_collection(model)[1].parameters():
            parameter.mul_(1e-13)
        for layer in (model.over_arch.model[0]._mlp[0]._linear, model.over_arch.model[1]):
            layer.weight.fill_(1e22)
            layer.bias.zero_()
        for parameter in model.dense_arch.parameters():
            parameter.zero_()
    before = everything(trainer)
    with pytest.raises(NonFiniteError, match=r"the pooled rows of cat_.* although the loss is finite"):
        trainer._train_step(next(batches(trainer)), PLACE)
    assert_same(trainer, before)


class PlainTorch:
    """The same training step with ordinary optimizers of all parameters: no kernel steps, no cut graph."""

    def __init__(self, trainer: Trainer, optimizer: str, rate: float) -> None:
        self.model = copy.deepcopy(trainer._model)
        for parameter in self.model.parameters():
            vars(parameter).pop("_in_backward_optimizers", None)
        tables = list(find_collection(self.model)[1].parameters())
        layers = [p for p in self.model.parameters() if all(p is not table for table in tables)]
        kinds = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "adam": torch.optim.Adam}
        kind: Any = kinds.get(optimizer, torch.optim.Adagrad)
        # Adam is lazy on tables: rows that a batch leaves out stay.
        lazy: dict[str, Any] = {"rowwise_adagrad": torchrec.optim.RowWiseAdagrad, "adam": LazyAdam}
        table_kind = lazy.get(optimizer, kind)
        options = {"lr": rate} | ({} if optimizer == "sgd" else {"eps": 1e-8})
        self.optimizers = [table_kind(tables, **options), kind(layers, **options)]

    def step(self, batch: Batch) -> Tensor:
        logits: Tensor = self.model(batch.dense_features, batch.sparse_features).squeeze(-1)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        binary_cross_entropy_with_logits(logits, batch.labels).backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return logits.detach()


def compare_with_plain_torch(config: RunConfig) -> None:
    trainer = make_trainer(config)
    assert config.learning_rate is not None
    reference = PlainTorch(trainer, config.optimizer, config.learning_rate)
    start = {name: value.clone() for name, value in trainer._model.state_dict().items()}
    for batch, _ in zip(batches(trainer), range(5), strict=False):
        logits = trainer._train_step(batch, PLACE)
        torch.testing.assert_close(logits, reference.step(batch), rtol=1e-4, atol=1e-5)
    expected = reference.model.state_dict()
    for name, value in trainer._model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
        assert not torch.equal(value, start[name]), name


@pytest.mark.parametrize("method", RATES)
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_training_equals_plain_torch(make_config: MakeConfig, optimizer: str, method: str) -> None:
    rate = 0.5 if optimizer == "sgd" else 0.02
    compare_with_plain_torch(
        make_config(optimizer=optimizer, method=method, compress_rate=RATES[method], learning_rate=rate)
    )


def test_the_dcn_model_equals_plain_torch(make_config: MakeConfig) -> None:
    compare_with_plain_torch(
        make_config(
            optimizer="adagrad", method="tt", compress_rate=5, interaction_type="dcn", dcn_low_rank_dim=4
        )
    )


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("method", RATES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_a_compiler_training_equals_plain_torch(
    make_config: MakeConfig, optimizer: str, method: str
) -> None:
    rate = 0.5 if optimizer == "sgd" else 0.02
    compare_with_plain_torch(
        make_config(optimizer=optimizer, method=method, compress_rate=RATES[method], learning_rate=rate)
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_uncompressed_table_has_no_gradient_and_keeps_untouched_rows(
    make_config: MakeConfig, optimizer: str
) -> None:
    trainer = make_trainer(make_config(optimizer=optimizer))
    collection = find_collection(trainer._model)[1]
    reached: list[torch.Size] = []
    for parameter in collection.parameters():
        parameter.register_hook(lambda grad: reached.append(grad.shape))
    start = {name: value.clone() for name, value in collection.state_dict().items()}
    touched: dict[str, set[int]] = {f"t_{name}": set() for name in trainer._batches.log.feature_names}
    for batch, _ in zip(batches(trainer), range(3), strict=False):
        trainer._train_step(batch, PLACE)
        for name in batch.sparse_features.keys():  # noqa: SIM118 - not a mapping
            touched[f"t_{name}"].update(batch.sparse_features[name].values().tolist())
    assert reached == []
    assert all(parameter.grad is None for parameter in collection.parameters())
    for table, rows in touched.items():
        key = f"embedding_bags.{table}.weight"
        moved = (collection.state_dict()[key] != start[key]).any(dim=1).nonzero().flatten().tolist()
        assert set(moved) <= rows
        assert moved


def test_the_combined_optimizers_keys_are_the_models(make_config: MakeConfig) -> None:
    trainer = make_trainer(make_config(method="robe", compress_rate=20, optimizer="rowwise_adagrad"))
    names = [name for name, _ in trainer._model.named_parameters()]
    optimizer: Any = trainer._optimizer
    assert sorted(optimizer.params) == sorted(names)
    state = optimizer.state_dict()["state"]
    for name, parameter in trainer._model.named_parameters():
        rows = (parameter.shape[0], 1) if "embedding_bags" in name else parameter.shape
        assert state[name]["sum"].shape == rows
    collection = find_collection(trainer._model)[1]
    assert all(
        type(p._in_backward_optimizers[0]) is torchrec.optim.RowWiseAdagrad for p in collection.parameters()
    )


def test_after_training_the_model_is_whole_again(make_config: MakeConfig) -> None:
    trainer = make_trainer(
        make_config(optimizer="sgd", limit_train_batches=2, validation_freq_within_epoch=None)
    )
    trainer.train()
    collection = find_collection(trainer._model)[1]
    before = {name: value.clone() for name, value in collection.state_dict().items()}
    batch = next(batches(trainer))
    trainer._model(batch.dense_features, batch.sparse_features).square().sum().backward()
    # A forward outside the loop reaches the tables, which step as apply_optimizer_in_backward promises.
    assert any(not torch.equal(value, before[name]) for name, value in collection.state_dict().items())


def test_float64_tables(make_config: MakeConfig) -> None:
    """No kernel takes them: optimizers step on whole gradients, in one pass and after the check."""
    torch.manual_seed(0)
    collection = recemb.EmbeddingBagCollection(
        tables=[
            recemb.EmbeddingBagConfig(
                name=f"t{k}",
                num_embeddings=20,
                embedding_dim=4,
                feature_names=[f"f{k}"],
                compression=compression,
            )
            for k, compression in enumerate((recemb.Dense(), recemb.TensorTrain(rank=2)))
        ]
    ).double()
    model = dlrm(collection, 3, [4], [4, 1])
    twin = copy.deepcopy(model)
    apply_optimizer_in_backward(torch.optim.Adam, collection.parameters(), {"lr": 0.1})
    plain = LazyAdam(find_collection(twin)[1].parameters(), lr=0.1)
    features = torchrec.KeyedJaggedTensor(
        keys=["f0", "f1"], values=torch.tensor([1, 2, 3, 19]), lengths=torch.tensor([2, 0, 1, 1])
    )
    tables = TableStep(collection)
    for _ in range(3):
        with tables.cut():
            logits = model(torch.ones(2, 3), features)
        logits.square().sum().backward()
        assert len(tables.gradients()) == 4
        tables.backward()
        plain.zero_grad()
        twin(torch.ones(2, 3), features).square().sum().backward()
        plain.step()
    pairs = zip(collection.parameters(), find_collection(twin)[1].parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    assert all(parameter.grad is None for parameter in collection.parameters())
