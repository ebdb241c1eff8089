"""Evaluation, early stopping, limits, interruption, order of batches."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from recemb.errors import ConfigError
from recemb.training.config import RunConfig
from recemb.training.interrupt import StopRequest
from recemb.training.loop import Evaluation, Trainer
from recemb.training.metrics import ClickMetrics, MetricValues
from recemb.training.setup import (
    build_model,
    build_optimizer,
    choose_tables,
    make_batches,
    open_log,
    table_sizes,
)

MakeConfig = Callable[..., RunConfig]


def make_trainer(config: RunConfig, stop: StopRequest | None = None) -> tuple[Trainer, list[Evaluation]]:
    log = open_log(config)
    model = build_model(config, log, choose_tables(config, log))
    evaluations: list[Evaluation] = []
    trainer = Trainer(
        config,
        model,
        build_optimizer(config, model),
        make_batches(config, log),
        stop or StopRequest(),
        evaluations.append,
    )
    return trainer, evaluations


def script(trainer: Trainer, aucs: list[float]) -> list[dict[str, torch.Tensor]]:
    """Make validations return ``aucs`` in turn; the weights at each are collected."""
    weights: list[dict[str, torch.Tensor]] = []

    def evaluate(split: str) -> MetricValues:
        weights.append({k: v.detach().clone() for k, v in trainer._model.state_dict().items()})
        return MetricValues(aucs[len(weights) - 1], 0.0, 0.5, 1.0, 1.0, 10)

    trainer._evaluate = evaluate  # type: ignore[method-assign]
    return weights


def test_evaluates_every_n_steps_and_at_each_epochs_end(make_config: MakeConfig) -> None:
    # 3,200 rows in batches of 200: 16 steps an epoch.
    trainer, evaluations = make_trainer(make_config(epochs=2, validation_freq_within_epoch=6))
    outcome = trainer.train()
    assert [e.step for e in evaluations] == [6, 12, 16, 22, 28, 32]
    assert [e.epoch for e in evaluations] == [0, 0, 0, 1, 1, 1]
    assert [e.train.num_samples for e in evaluations] == [1200, 1200, 800, 1200, 1200, 800]
    assert all(e.values.num_samples == 400 for e in evaluations)
    assert (outcome.steps, outcome.epochs, outcome.samples) == (32, 2, 6400)
    assert len(outcome.step_ms) == 32
    assert outcome.samples_per_second > 0


def test_speed_leaves_out_the_first_step_which_compiles(make_config: MakeConfig) -> None:
    trainer, _ = make_trainer(make_config(limit_train_batches=3))
    record = trainer._record_step
    assert trainer.outcome.samples_per_second is None
    speeds = []

    def record_scripted(batch: Any, logits: torch.Tensor, seconds: float) -> None:
        record(batch, logits, 0.5 if trainer.outcome.steps else 60.0)
        speeds.append(trainer.outcome.samples_per_second)

    trainer._record_step = record_scripted  # type: ignore[method-assign]
    outcome = trainer.train()
    assert speeds == [None, pytest.approx(400), pytest.approx(400)]
    assert outcome.warm_step_ms.tolist() == [500, 500]
    # What it took is not lost.
    assert (outcome.samples, outcome.train_seconds) == (600, 61)


def test_no_frequency_means_once_an_epoch(make_config: MakeConfig) -> None:
    trainer, evaluations = make_trainer(make_config(epochs=2, validation_freq_within_epoch=None))
    trainer.train()
    assert [e.step for e in evaluations] == [16, 32]


def test_frequency_that_divides_the_epoch_does_not_repeat_its_end(make_config: MakeConfig) -> None:
    trainer, evaluations = make_trainer(make_config(validation_freq_within_epoch=8))
    trainer.train()
    assert [e.step for e in evaluations] == [8, 16]


def test_limits(make_config: MakeConfig) -> None:
    config = make_config(
        limit_train_batches=3, limit_val_batches=1, limit_test_batches=2, test_batch_size=150
    )
    trainer, evaluations = make_trainer(config)
    assert trainer.train().steps == 3
    assert evaluations[-1].values.num_samples == 150
    test = trainer.test()
    assert test is not None
    assert test.num_samples == 300


def test_early_stopping_restores_the_best_weights(make_config: MakeConfig) -> None:
    trainer, evaluations = make_trainer(make_config(epochs=5, validation_freq_within_epoch=2, patience=3))
    weights = script(trainer, [0.6, 0.7, 0.69, 0.7, 0.5, 0.9])
    outcome = trainer.train()
    # 0.7 again is no improvement: the third evaluation after step 4 ends the run.
    assert [e.step for e in evaluations] == [2, 4, 6, 8, 10]
    assert [e.best for e in evaluations] == [True, True, False, False, False]
    assert outcome.best is evaluations[1]
    assert outcome.stopped is not None
    assert "step 4" in outcome.stopped
    for name, value in trainer._model.state_dict().items():
        assert torch.equal(value, weights[1][name])


def test_best_weights_are_restored_without_patience_too(make_config: MakeConfig) -> None:
    trainer, _ = make_trainer(make_config(validation_freq_within_epoch=8))
    weights = script(trainer, [0.8, 0.7])
    outcome = trainer.train()
    assert outcome.stopped is None
    assert all(torch.equal(v, weights[0][k]) for k, v in trainer._model.state_dict().items())


def test_a_split_of_one_class_is_scored_by_logloss(make_config: MakeConfig) -> None:
    trainer, evaluations = make_trainer(make_config(epochs=1, validation_freq_within_epoch=8))
    losses = iter([0.5, 0.4])
    trainer._evaluate = lambda split: MetricValues(  # type: ignore[method-assign]
        math.nan, math.nan, next(losses), math.nan, math.nan, 5
    )
    trainer.train()
    assert [e.best for e in evaluations] == [True, True]


def test_evaluation_equals_a_pass_by_hand(make_config: MakeConfig) -> None:
    trainer, evaluations = make_trainer(make_config(validation_freq_within_epoch=None, test_batch_size=64))
    trainer.train()
    log = open_log(make_config())
    expected = ClickMetrics()
    trainer._model.eval()
    with torch.no_grad():
        for batch in make_batches(make_config(test_batch_size=400), log).evaluation("val"):
            logits = trainer._model(batch.dense_features, batch.sparse_features).squeeze(-1)
            expected.update(logits.numpy(), batch.labels.numpy())
    values = expected.compute()
    assert evaluations[-1].values.num_samples == values.num_samples == 400
    # Other batch sizes may round a matrix product in another way, so equal bits are not owed.
    assert evaluations[-1].values.auc == pytest.approx(values.auc, abs=1e-4)
    assert evaluations[-1].values.logloss == pytest.approx(values.logloss, abs=1e-6)


def test_training_learns(make_config: MakeConfig) -> None:
    trainer, evaluations = make_trainer(
        make_config(epochs=15, learning_rate=0.01, validation_freq_within_epoch=None)
    )
    trainer.train()
    assert evaluations[-1].train.logloss < evaluations[0].train.logloss - 0.02
    assert max(e.values.auc for e in evaluations) > 0.6


def test_shuffling_depends_on_seed_and_epoch(make_config: MakeConfig) -> None:
    def order(epoch: int, **changes: Any) -> list[float]:
        config = make_config(**changes)
        batches = make_batches(config, open_log(config)).train(epoch)
        return np.concatenate([batch.dense_features[:, 0].numpy() for batch in batches]).tolist()

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != order(0, seed=1)
    plain = order(0, shuffle_batches=False)
    assert plain == order(3, shuffle_batches=False)
    assert sorted(plain) == sorted(order(1))


def test_folded_and_given_table_sizes(make_config: MakeConfig) -> None:
    log = open_log(make_config())
    capped = make_config(num_embeddings=50)
    assert table_sizes(capped, log) == [min(50, n) for n in log.num_embeddings_per_feature]
    batches = make_batches(capped, log)
    seen = [max(batch.sparse_features[name].values().max() for batch in batches.train(0))
            for name in log.feature_names]  # fmt: skip
    assert max(seen) == 49
    trainer, _ = make_trainer(capped)
    assert trainer.train().steps == 16

    larger = make_config(num_embeddings_per_feature=[n + 3 for n in log.num_embeddings_per_feature])
    assert make_batches(larger, log).hash_sizes is None
    with pytest.raises(ConfigError, match=r"has 2 sizes and .* has 26 categorical features"):
        table_sizes(make_config(num_embeddings_per_feature="3,4"), log)


def test_a_log_that_does_not_fit_the_configuration(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"--dataset_name criteo_1tb: .* holds synthetic"):
        open_log(make_config(dataset_name="criteo_1tb"))
    assert open_log(make_config(dataset_name="synthetic")).num_rows("train") == 3200


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_f31_a_signal_finishes_the_step(
    make_config: MakeConfig, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(number)
    with StopRequest() as stop:
        trainer, _ = make_trainer(make_config(), stop)
        step = trainer._train_step

        def step_then_signal(*args: Any) -> torch.Tensor:
            logits = step(*args)
            if trainer.outcome.steps == 2:
                os.kill(os.getpid(), number)
            return logits

        trainer._train_step = step_then_signal  # type: ignore[method-assign]
        outcome = trainer.train()
        assert (outcome.steps, outcome.interrupted) == (3, number.name)
        assert trainer.test() is None
        # The second signal is no longer caught.
        assert signal.getsignal(number) == handler
    assert f"{number.name}: stopping after this step" in capfd.readouterr().err


def test_a_signal_during_evaluation_ends_it(make_config: MakeConfig) -> None:
    stop = StopRequest()
    trainer, evaluations = make_trainer(make_config(test_batch_size=50), stop)
    evaluate = trainer._evaluate

    def stopped(split: str) -> MetricValues:
        stop.requested = "SIGTERM"
        return evaluate(split)

    trainer._evaluate = stopped  # type: ignore[method-assign]
    outcome = trainer.train()
    assert (outcome.steps, outcome.interrupted, evaluations) == (5, "SIGTERM", [])
