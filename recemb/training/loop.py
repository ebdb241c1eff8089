"""The training loop: steps, evaluations, early stopping on the validation split, best weights restored."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.datasets.utils import Batch

from recemb.cache.metrics import CacheMetrics
from recemb.errors import NonFiniteError
from recemb.training.config import RunConfig
from recemb.training.guards import Place, check_gradients, check_inputs, check_loss
from recemb.training.interrupt import StopRequest
from recemb.training.metrics import ClickMetrics, MetricValues
from recemb.training.progress import Progress
from recemb.training.setup import ClickBatches
from recemb.training.table_step import TableStep, find_collection


@dataclass(frozen=True)
class Evaluation:
    """One pass over a split after ``step`` training steps.

    ``train`` holds the metrics of the training batches since the evaluation before, each computed before its
    own step (progressive validation); ``best`` says that no earlier evaluation was as good; ``caches`` is
    what the cached tables have done by then.
    """

    step: int
    epoch: int
    samples: int
    split: str
    values: MetricValues
    train: MetricValues
    seconds: float
    best: bool
    caches: dict[str, CacheMetrics] = field(default_factory=dict)


@dataclass
class Outcome:
    """What a run has reached; filled while it goes, so that a stopped run can be reported too."""

    evaluations: list[Evaluation] = field(default_factory=list)
    best: Evaluation | None = None
    steps: int = 0
    epochs: int = 0
    samples: int = 0
    train_seconds: float = 0.0
    step_ms: array[float] = field(default_factory=lambda: array("d"))
    stopped: str | None = None
    interrupted: str | None = None

    @property
    def samples_per_second(self) -> float:
        """Training samples over the wall time of the training steps, reading included, evaluation not."""
        return self.samples / self.train_seconds if self.train_seconds > 0 else 0.0


class _Stopped(Exception):  # noqa: N818 - control flow within this file, not an error
    """Ends the epochs early; ``Outcome.stopped`` or ``Outcome.interrupted`` says why."""


class Trainer:
    """Trains ``model`` on ``batches`` as ``config`` asks.

    Args:
        config: batch sizes, epochs, evaluation frequency, patience, device.
        model: returns logits [B, 1] for dense features and a KeyedJaggedTensor; has one collection.
        optimizer: of :func:`recemb.training.setup.build_optimizer`: the tables step in their backward.
        batches: the data.
        stop: asked between steps whether to go on.
        on_evaluation: called with each evaluation, in order (the run directory's log).
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: ClickBatches,
        stop: StopRequest,
        on_evaluation: Callable[[Evaluation], None],
    ) -> None:
        self.outcome = Outcome()
        self._config = config
        self._model = model
        self._optimizer = optimizer
        path, collection = find_collection(model)
        self._tables = TableStep(collection)
        self._dense = [(name, p) for name, p in model.named_parameters() if not name.startswith(f"{path}.")]
        self._batches = batches
        self._stop = stop
        self._on_evaluation = on_evaluation
        self._train_metrics = ClickMetrics()
        self._best_weights: dict[str, Tensor] | None = None
        self._progress = Progress(config.method, config.epochs * batches.count("train"))

    def train(self) -> Outcome:
        """Run all epochs, or fewer when patience runs out or a signal comes; leaves the best weights.

        Raises:
            NonFiniteError, DataError: a batch or the loss cannot be used; its batch changed no weight.
        """
        try:
            for epoch in range(self._config.epochs):
                self._train_epoch(epoch)
        except _Stopped:
            if self.outcome.stopped is not None:
                self._progress.note(self.outcome.stopped)
        finally:
            self._progress.close()
            self.restore_best()
        return self.outcome

    def restore_best(self) -> None:
        """Put back the weights of the best evaluation, when later steps have moved on from it."""
        if self._best_weights is not None:
            self._model.load_state_dict(self._best_weights)
            self._best_weights = None

    def test(self) -> MetricValues | None:
        """Metrics of the test split with the current weights; ``None`` without one, or on a signal."""
        if self._batches.count("test") == 0:
            return None
        try:
            return self._evaluate("test")
        except _Stopped:
            return None

    def _evaluate(self, split: str) -> MetricValues:
        metrics = ClickMetrics()
        self._model.eval()
        try:
            with torch.inference_mode():
                for index, batch in enumerate(self._batches.evaluation(split)):
                    self._check_interrupt()
                    place = Place(split, self.outcome.epochs, index)
                    check_inputs(batch, self._batches.log.dense_names, place)
                    logits = self._logits(batch)
                    if not bool(torch.isfinite(logits).all()):
                        raise NonFiniteError(f"{place}: the model's logits are not finite: training diverged")
                    metrics.update(logits.cpu().numpy(), batch.labels.numpy())
        finally:
            self._model.train()
        return metrics.compute()

    def _train_epoch(self, epoch: int) -> None:
        frequency = self._config.validation_freq_within_epoch
        total = self._batches.count("train")
        self._model.train()
        batches = self._batches.train(epoch)
        for index in range(total):
            started = time.perf_counter()
            batch = next(batches)
            logits = self._train_step(batch, Place("train", epoch, index))
            self._record_step(batch, logits, time.perf_counter() - started)
            self._check_interrupt()
            if index + 1 == total:
                self.outcome.epochs = epoch + 1
            if index + 1 == total or (frequency is not None and (index + 1) % frequency == 0):
                self._validate(epoch)

    def _train_step(self, batch: Batch, place: Place) -> Tensor:
        learning_rate = float(self._optimizer.param_groups[0]["lr"])
        check_inputs(batch, self._batches.log.dense_names, place)
        self._optimizer.zero_grad(set_to_none=True)
        with self._tables.cut():
            logits = self._logits(batch)
        loss = binary_cross_entropy_with_logits(logits, batch.labels.to(logits.device))
        check_loss(loss.detach(), logits, learning_rate, place)
        # mypy: torch leaves Tensor.backward untyped.
        loss.backward()  # type: ignore[no-untyped-call]
        dense = [(name, value.grad) for name, value in self._dense if value.grad is not None]
        check_gradients(dense + self._tables.gradients(), self._tables.pooled, learning_rate, place)
        self._tables.backward()
        self._optimizer.step()
        return logits.detach()

    def _logits(self, batch: Batch) -> Tensor:
        moved = batch if self._config.device == "cpu" else batch.to(torch.device(self._config.device))
        logits: Tensor = self._model(moved.dense_features, moved.sparse_features)
        return logits.squeeze(-1)

    def _record_step(self, batch: Batch, logits: Tensor, seconds: float) -> None:
        outcome = self.outcome
        outcome.steps += 1
        outcome.samples += len(batch.labels)
        outcome.train_seconds += seconds
        outcome.step_ms.append(seconds * 1e3)
        self._train_metrics.update(logits.cpu().numpy(), batch.labels.numpy())
        figures = self._train_metrics.compute() if self._progress.wants_figures else None
        self._progress.step(figures, outcome.samples_per_second)

    def _validate(self, epoch: int) -> None:
        """Evaluate, log, remember the best weights, and stop when patience has run out."""
        if self._batches.count("val") == 0:
            return
        started = time.perf_counter()
        values = self._evaluate("val")
        best = self.outcome.best
        evaluation = Evaluation(
            step=self.outcome.steps,
            epoch=epoch,
            samples=self.outcome.samples,
            split="val",
            values=values,
            train=self._train_metrics.compute(),
            seconds=time.perf_counter() - started,
            best=best is None or _score(values) > _score(best.values),
            caches=self._tables.collection.cache_metrics(),
        )
        self._train_metrics = ClickMetrics()
        self.outcome.evaluations.append(evaluation)
        self._on_evaluation(evaluation)
        self._progress.evaluation(evaluation, self.outcome.samples_per_second)
        if evaluation.best:
            self.outcome.best = evaluation
            self._best_weights = None
            if self.outcome.steps < self._config.epochs * self._batches.count("train"):
                self._best_weights = {
                    name: value.detach().clone() for name, value in self._model.state_dict().items()
                }
        self._check_patience()

    def _check_patience(self) -> None:
        patience, best = self._config.patience, self.outcome.best
        if patience is None or best is None:
            return
        since = sum(evaluation.step > best.step for evaluation in self.outcome.evaluations)
        if since >= patience:
            self.outcome.stopped = (
                f"stopped early: the last {since} evaluations were no better than that of step {best.step}"
            )
            raise _Stopped

    def _check_interrupt(self) -> None:
        if self._stop.requested is not None:
            self.outcome.interrupted = self._stop.requested
            raise _Stopped


def _score(values: MetricValues) -> float:
    """Higher is better: AUC, or minus logloss for a split of a single class, where AUC is undefined."""
    return -values.logloss if math.isnan(values.auc) else values.auc
