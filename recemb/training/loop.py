"""The training loop: steps, evaluations, early stopping on the validation split, best weights restored."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.datasets.utils import Batch

from recemb.cache.metrics import CacheMetrics
from recemb.errors import NonFiniteError, RecembError
from recemb.torchrec_io.batches import blank_row
from recemb.training.config import RunConfig
from recemb.training.distributed import World
from recemb.training.guards import Place, check_gradients, check_inputs, check_loss
from recemb.training.interrupt import StopRequest
from recemb.training.metrics import ClickMetrics, MetricValues
from recemb.training.progress import Progress
from recemb.training.setup import ClickBatches
from recemb.training.table_step import table_step


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
class WarmUp:
    """The first step of each process that trained: kernels are compiled or loaded in it, memory is mapped.

    Whatever the device. What a later step compiles, as a GPU does for batches of another shape, counts.

    Attributes:
        steps: their numbers, from 0.
    """

    steps: list[int] = field(default_factory=list)
    samples: int = 0
    seconds: float = 0.0


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
    warm_up: WarmUp = field(default_factory=WarmUp)
    stopped: str | None = None
    interrupted: str | None = None

    @property
    def samples_per_second(self) -> float | None:
        """Training samples over the wall time of the training steps, reading included, evaluation not.

        Without each process's first step; ``None`` before there is another one.
        """
        seconds = self.train_seconds - self.warm_up.seconds
        return (self.samples - self.warm_up.samples) / seconds if seconds > 0 else None

    @property
    def warm_step_ms(self) -> NDArray[np.float64]:
        """``step_ms`` without each process's first step."""
        return np.delete(np.frombuffer(self.step_ms, dtype=np.float64), self.warm_up.steps)


class _Stopped(Exception):  # noqa: N818 - control flow within this file, not an error
    """Ends the epochs early; ``Outcome.stopped`` or ``Outcome.interrupted`` says why."""


class Trainer:
    """Trains ``model`` on ``batches`` as ``config`` asks.

    With several ranks, each has its part of every batch and all of them take the same steps: what one rank
    finds out (a bad batch, a loss that is not finite, a signal) is agreed on before anything changes.

    Args:
        config: batch sizes, epochs, evaluation frequency, patience, device.
        model: returns logits [B, 1] for dense features and a KeyedJaggedTensor; has one collection.
        optimizer: of :func:`recemb.training.setup.build_optimizer`: the tables step in their backward.
        batches: the data.
        stop: asked between steps whether to go on.
        on_evaluation: called with each evaluation, in order, on rank 0 (the run directory's log).
        world: the ranks.
        on_checkpoint: called on every rank between two steps when a checkpoint is due: every
            ``checkpoint_freq`` steps, at the end if there are any before, and when a signal stops the run.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: ClickBatches,
        stop: StopRequest,
        on_evaluation: Callable[[Evaluation], None],
        world: World = World(),  # noqa: B008 - one process, and unchanging
        on_checkpoint: Callable[[], None] | None = None,
    ) -> None:
        self.outcome = Outcome()
        self.best_weights: dict[str, Any] | None = None
        self.train_metrics = ClickMetrics()
        self._config = config
        self._model = model
        self._optimizer = optimizer
        path, self._tables = table_step(model)
        self._dense = [(name, p) for name, p in model.named_parameters() if not name.startswith(f"{path}.")]
        self._batches = batches
        self._stop = stop
        self._on_evaluation = on_evaluation
        self._world = world
        self._on_checkpoint = on_checkpoint
        self._is_warm = False
        self._steps_per_epoch = batches.count("train")
        self._progress = Progress(config.method, self.last_step, shown=world.is_first)

    @property
    def last_step(self) -> int:
        """Steps of the whole run, should nothing stop it early."""
        return self._config.epochs * self._steps_per_epoch

    def train(self) -> Outcome:
        """Run all epochs, or fewer when patience runs out or a signal comes; leaves the best weights.

        Starts after ``outcome.steps`` steps, which are those of a restored checkpoint.

        Raises:
            NonFiniteError, DataError: a batch or the loss cannot be used; its batch changed no weight.
        """
        done = self.outcome.steps
        self._progress.resume(done)
        try:
            if self._evaluation_due() and all(one.step != done for one in self.outcome.evaluations):
                self._validate()
            for epoch in range(done // self._steps_per_epoch, self._config.epochs):
                self._train_epoch(epoch)
        except _Stopped:
            if self.outcome.stopped is not None:
                self._progress.note(self.outcome.stopped)
            # Before the first step there is nothing that starting anew would not make again.
            if self.outcome.interrupted is not None and self.outcome.steps > 0:
                self._checkpoint()
        else:
            frequency = self._config.checkpoint_freq
            if frequency and self.outcome.steps > done and self.outcome.steps % frequency:
                self._checkpoint()
        finally:
            self._progress.close()
            self.restore_best()
        return self.outcome

    def _checkpoint(self) -> None:
        if self._on_checkpoint is not None:
            self._on_checkpoint()

    def note(self, text: str) -> None:
        """Tell whoever watches, on rank 0."""
        self._progress.note(text)

    def restore_best(self) -> None:
        """Put back the weights of the best evaluation, when later steps have moved on from it."""
        if self.best_weights is not None:
            self._model.load_state_dict(self.best_weights)
            self.best_weights = None

    def test(self) -> MetricValues | None:
        """Metrics of the test split with the current weights; ``None`` without one, or on a signal."""
        if self._batches.count("test") == 0:
            return None
        try:
            return self._evaluate("test")
        except _Stopped:
            return None

    def cache_metrics(self) -> dict[str, CacheMetrics]:
        """What the cached tables have done so far, by name, on whichever rank; every rank calls it."""
        own = {name: asdict(metrics) for name, metrics in self._tables.cache_metrics().items()}
        return {
            name: CacheMetrics(**metrics)
            for each in self._world.exchange(own)
            for name, metrics in each.items()
        }

    def _evaluate(self, split: str) -> MetricValues:
        metrics = ClickMetrics()
        self._model.eval()
        # fbgemm has no kernels for tensors of inference mode on the CPU.
        without_gradients = torch.inference_mode() if self._world.size == 1 else torch.no_grad()
        batches = self._batches.evaluation(split)
        try:
            with without_gradients:
                for index in range(self._batches.count(split)):
                    place = Place(split, self.outcome.epochs, index)
                    batch = self._next(batches, place)
                    logits = self._logits(batch)
                    with self._world.agreeing():
                        if not bool(torch.isfinite(logits).all()):
                            raise NonFiniteError(
                                f"{place}: the model's logits are not finite: training diverged"
                            )
                    metrics.update(logits.cpu().numpy(), batch.labels.numpy())
        finally:
            self._model.train()
        return self._merged(metrics).compute()

    def _train_epoch(self, epoch: int) -> None:
        frequency = self._config.checkpoint_freq
        first = self.outcome.steps - epoch * self._steps_per_epoch
        self._model.train()
        batches = self._batches.train(epoch, first)
        for index in range(first, self._steps_per_epoch):
            started = time.perf_counter()
            place = Place("train", epoch, index)
            batch = self._next(batches, place)
            logits = self._train_step(batch, place)
            self._record_step(batch, logits, time.perf_counter() - started)
            if index + 1 == self._steps_per_epoch:
                self.outcome.epochs = epoch + 1
            if self._evaluation_due():
                self._validate()
            if frequency and self.outcome.steps % frequency == 0:
                self._checkpoint()

    def _next(self, batches: Iterator[Batch], place: Place) -> Batch:
        """This rank's part of a batch, once every rank has its own and none has been asked to stop."""
        self._world.note(f"reading {place}")
        error: RecembError | None = None
        try:
            batch = next(batches)
            check_inputs(batch, self._batches.log.dense_names, place)
        except RecembError as problem:
            error = problem
        self.outcome.interrupted = self._world.agree(error, self._stop.requested)
        if self.outcome.interrupted is not None:
            raise _Stopped
        self._world.note(f"computing {place}")
        return batch

    def _train_step(self, batch: Batch, place: Place) -> Tensor:
        learning_rate = float(self._optimizer.param_groups[0]["lr"])
        self._optimizer.zero_grad(set_to_none=True)
        with self._tables.cut():
            logits = self._logits(batch)
        loss = self._loss(logits, batch.labels.to(logits.device), place)
        error: NonFiniteError | None = None
        own = True
        try:
            check_loss(loss.detach(), logits, learning_rate, place)
        except NonFiniteError as problem:
            error = problem
            if self._world.size == 1:
                raise
        # The dense layers' gradients are averaged in it: a rank whose loss is not finite comes along.
        # mypy: torch leaves Tensor.backward untyped.
        loss.backward()  # type: ignore[no-untyped-call]
        dense = [(name, value.grad) for name, value in self._dense if value.grad is not None]
        try:
            if error is None:
                gradients = dense + self._tables.gradients()
                check_gradients(gradients, self._tables.pooled, learning_rate, place)
        except NonFiniteError as problem:
            error, own = problem, False
        self._world.agree(error, own=own)
        self._tables.backward()
        self._optimizer.step()
        return logits.detach()

    def _loss(self, logits: Tensor, labels: Tensor, place: Place) -> Tensor:
        """What averages over the ranks to the mean over all rows of the batch, however they are spread."""
        if self._world.size == 1:
            return binary_cross_entropy_with_logits(logits, labels)
        scale = self._world.size / self._batches.num_rows("train", place.batch)
        return binary_cross_entropy_with_logits(logits, labels, reduction="sum") * scale

    def _logits(self, batch: Batch) -> Tensor:
        if len(batch.labels) == 0:
            # Not every model can reshape a batch of no rows; this row meets the other ranks', and is dropped.
            log = self._batches.log
            return self._logits(blank_row(log.feature_names, len(log.dense_names)))[:0]
        moved = batch if self._config.device == "cpu" else batch.to(torch.device(self._config.device))
        logits: Tensor = self._model(moved.dense_features, moved.sparse_features)
        return logits.squeeze(-1)

    def _record_step(self, batch: Batch, logits: Tensor, seconds: float) -> None:
        outcome = self.outcome
        samples = self._batches.num_rows("train", outcome.steps % self._steps_per_epoch)
        if not self._is_warm:
            outcome.warm_up.steps.append(outcome.steps)
            outcome.warm_up.samples += samples
            outcome.warm_up.seconds += seconds
            self._is_warm = True
        outcome.samples += samples
        outcome.steps += 1
        outcome.train_seconds += seconds
        outcome.step_ms.append(seconds * 1e3)
        self.train_metrics.update(logits.cpu().numpy(), batch.labels.numpy())
        figures = self.train_metrics.compute() if self._progress.wants_figures else None
        self._progress.step(figures, outcome.samples_per_second)

    def _merged(self, metrics: ClickMetrics) -> ClickMetrics:
        """The metrics of all ranks' rows."""
        if self._world.size == 1:
            return metrics
        return ClickMetrics.from_counts(self._world.sum(metrics.counts()))

    def _evaluation_due(self) -> bool:
        """After this many steps; not whether it has been done."""
        frequency = self._config.validation_freq_within_epoch
        steps, index = self.outcome.steps, self.outcome.steps % self._steps_per_epoch
        if steps == 0 or self._batches.count("val") == 0:
            return False
        return index == 0 or (frequency is not None and index % frequency == 0)

    def _validate(self) -> None:
        """Evaluate, log, remember the best weights, and stop when patience has run out."""
        started = time.perf_counter()
        values = self._evaluate("val")
        best = self.outcome.best
        evaluation = Evaluation(
            step=self.outcome.steps,
            epoch=(self.outcome.steps - 1) // self._steps_per_epoch,
            samples=self.outcome.samples,
            split="val",
            values=values,
            train=self._merged(self.train_metrics).compute(),
            seconds=time.perf_counter() - started,
            best=best is None or _score(values) > _score(best.values),
            caches=self.cache_metrics(),
        )
        self.train_metrics = ClickMetrics()
        self.outcome.evaluations.append(evaluation)
        self._world.first(lambda: self._on_evaluation(evaluation))
        self._progress.evaluation(evaluation, self.outcome.samples_per_second)
        if evaluation.best:
            self.outcome.best = evaluation
            self.best_weights = None
            if self.outcome.steps < self.last_step:
                self.best_weights = {
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


def _score(values: MetricValues) -> float:
    """Higher is better: AUC, or minus logloss for a split of a single class, where AUC is undefined."""
    return -values.logloss if math.isnan(values.auc) else values.auc
