"""Nothing that is not finite reaches a weight (FAILURES F12, F13)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec.datasets.utils import Batch

from recemb.errors import DataError, NonFiniteError
from recemb.training.config import RunConfig
from recemb.training.interrupt import StopRequest
from recemb.training.loop import Trainer
from recemb.training.setup import (
    ClickBatches,
    build_model,
    build_optimizer,
    choose_tables,
    make_batches,
    open_log,
)

BAD_BATCH = 2
Spoil = Callable[[Batch], None]


class SpoiltBatches(ClickBatches):
    """The real batches; ``spoil`` edits training batch ``BAD_BATCH``, and ``before`` sees the model there."""

    spoil: Spoil
    before: Callable[[], None]

    def train(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        for index, batch in enumerate(super().train(epoch, start_batch)):
            if index == BAD_BATCH:
                self.before()
                self.spoil(batch)
            yield batch


def train_spoilt(config: RunConfig, spoil: Spoil) -> tuple[nn.Module, dict[str, Tensor], Trainer]:
    """Train with one bad batch; returns the model and a copy of its weights from just before that batch."""
    log = open_log(config)
    model = build_model(config, log, choose_tables(config, log))
    snapshot: dict[str, Tensor] = {}
    plain = make_batches(config, log)
    batches = SpoiltBatches(plain.log, plain.config, plain.hash_sizes)
    object.__setattr__(batches, "spoil", spoil)
    object.__setattr__(
        batches,
        "before",
        lambda: snapshot.update({k: v.detach().clone() for k, v in model.state_dict().items()}),
    )
    trainer = Trainer(
        config, model, build_optimizer(config, model), batches, StopRequest(), lambda evaluation: None
    )
    return model, snapshot, trainer


def assert_unchanged(model: nn.Module, snapshot: dict[str, Tensor]) -> None:
    assert snapshot
    assert [k for k, v in model.state_dict().items() if not torch.equal(v, snapshot[k])] == []


def set_dense(column: int, value: float) -> Spoil:
    def spoil(batch: Batch) -> None:
        batch.dense_features[7, column] = value

    return spoil


def set_label(value: float) -> Spoil:
    def spoil(batch: Batch) -> None:
        batch.labels[5] = value

    return spoil


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (set_dense(3, float("nan")), NonFiniteError, r"dense feature int_3 .* sample 7"),
        (set_dense(12, float("inf")), NonFiniteError, r"dense feature int_12 .* sample 7"),
        (set_dense(0, float("-inf")), NonFiniteError, r"dense feature int_0 "),
        (set_label(float("nan")), NonFiniteError, r"label nan of sample 5"),
        (set_label(2.0), DataError, r"label 2 of sample 5 must be 0 or 1"),
        (set_label(-1.0), DataError, r"label -1 of sample 5"),
    ],
)
@pytest.mark.parametrize("optimizer", ["adam", "adagrad", "rowwise_adagrad", "sgd"])
def test_f12_bad_input_stops_before_any_weight_changes(
    make_config: Callable[..., RunConfig], spoil: Spoil, error: type[Exception], message: str, optimizer: str
) -> None:
    config = make_config(
        method="tt", compress_rate=5, optimizer=optimizer, validation_freq_within_epoch=None, epochs=1
    )
    model, snapshot, trainer = train_spoilt(config, spoil)
    with pytest.raises(error, match=rf"train batch {BAD_BATCH} of epoch 0: .*{message}"):
        trainer.train()
    assert trainer.outcome.steps == BAD_BATCH
    assert_unchanged(model, snapshot)


def test_f13_diverged_loss_stops_before_any_weight_changes(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(validation_freq_within_epoch=None)
    model, snapshot, trainer = train_spoilt(config, lambda batch: None)

    def explode(batch: Batch) -> None:
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
        snapshot.update({k: v.detach().clone() for k, v in model.state_dict().items()})

    object.__setattr__(trainer._batches, "spoil", explode)
    with pytest.raises(NonFiniteError, match=r"batch 2 of epoch 0: the loss is nan .*--learning_rate"):
        trainer.train()
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), snapshot[name].nan_to_num(7.0))


def test_f13_overflowing_gradient_stops_before_any_weight_changes(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, snapshot, trainer = train_spoilt(make_config(), lambda batch: None)
    # Tables may have no gradient, as they step in their backward: test_table_step.py sees to them.
    name, parameter = next(pair for pair in model.named_parameters() if "embedding_bags" not in pair[0])

    def overflow(batch: Batch) -> None:
        parameter.register_hook(lambda grad: grad + float("inf"))

    object.__setattr__(trainer._batches, "spoil", overflow)
    with pytest.raises(
        NonFiniteError, match=rf"gradient of {name} is NaN or infinite although the loss is fin"
    ):
        trainer.train()
    assert_unchanged(model, snapshot)


def test_large_finite_inputs_are_not_refused(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(limit_train_batches=BAD_BATCH + 1, learning_rate=1e-30, optimizer="sgd")

    def huge(batch: Batch) -> None:
        # Finite values whose sum overflows: the quick check trips, the exact one clears them.
        batch.dense_features.fill_(0.0)
        batch.dense_features[:2, 0] = 3e38

    model, _, trainer = train_spoilt(config, huge)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    outcome = trainer.train()
    assert outcome.steps == BAD_BATCH + 1


def test_evaluation_refuses_a_model_that_diverged(make_config: Callable[..., RunConfig]) -> None:
    model, _, trainer = train_spoilt(make_config(), lambda batch: None)
    with torch.no_grad():
        list(model.parameters())[-1].fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="val batch 0 of epoch 0: the model's logits are not finite"):
        trainer._evaluate("val")
    assert model.training


def test_best_weights_survive_a_bad_batch(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(validation_freq_within_epoch=1)
    model, _, trainer = train_spoilt(config, set_dense(1, float("nan")))
    log: list[Any] = []
    weights: dict[int, dict[str, Tensor]] = {}

    def remember(evaluation: Any) -> None:
        log.append(evaluation)
        weights[evaluation.step] = {k: v.detach().clone() for k, v in model.state_dict().items()}

    trainer._on_evaluation = remember
    with pytest.raises(NonFiniteError):
        trainer.train()
    assert len(log) == BAD_BATCH
    best = max(log, key=lambda evaluation: evaluation.values.auc)
    assert trainer.outcome.best == replace(best)
    assert_unchanged(model, weights[best.step])
