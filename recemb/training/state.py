"""Everything a run is between two steps, gathered in one place and put back: what ``--resume`` goes on from.

Where a run is follows from the number of steps: each epoch has equally many, and its order of rows is a
function of the seed and the epoch. Nothing in a step draws random numbers, so there is no generator to save.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from recemb.cache.metrics import CacheMetrics
from recemb.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from recemb.data.click_log import ClickLog
from recemb.errors import ConfigError, DiskFullError
from recemb.training.config import OPERATIONAL_FIELDS, RunConfig
from recemb.training.distributed import World
from recemb.training.loop import Evaluation, Outcome, Trainer, WarmUp
from recemb.training.metrics import ClickMetrics, MetricValues
from recemb.training.optimizer_state import as_on_one_process

# What may differ between a run and its continuation. The batch is compared over all ranks.
_FREE: Final = OPERATIONAL_FIELDS | {"epochs", "patience", "batch_size", "test_batch_size", "device"}


class TrainerState:
    """Saves and restores a trainer, its model and its optimizer; every rank calls each method.

    Args:
        root: the run's directory of checkpoints.
        trainer: between two steps.
        model: its model.
        optimizer: its optimizer.
        settings: of :func:`settings_of`; those of a checkpoint must be equal.
        world: the ranks.
    """

    def __init__(
        self,
        root: Path,
        trainer: Trainer,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: Mapping[str, Any],
        world: World,
    ) -> None:
        self._root = root
        self._trainer, self._model, self._optimizer = trainer, model, optimizer
        self._settings, self._world = settings, world
        self.saved_step: int | None = None

    def save(self) -> None:
        """Save a checkpoint of the step that has just ended, unless the disk is full: training goes on then.

        Raises:
            CheckpointError: it cannot be written for another reason; those before are intact.
            NonFiniteError, RankLost: as :func:`recemb.checkpoint.save_checkpoint`.
        """
        trainer, outcome = self._trainer, self._trainer.outcome
        self._world.note(f"saving a checkpoint of step {outcome.steps}")
        best, merged = trainer.best_weights, self._world.sum(trainer.train_metrics.counts())
        later = best is not None and outcome.best is not None and outcome.best.step < outcome.steps
        state = self._tensors(torch.from_numpy(merged), best if later else None)
        if self._world.is_first and outcome.step_ms:
            state["step_ms"] = torch.tensor(outcome.step_ms, dtype=torch.float64)
        extra = {
            "settings": self._settings,
            "outcome": _outcome_json(outcome),
            "best_weights": later,
            "fbgemm_iteration": max(self._world.exchange(_fbgemm_iteration(self._model))),
        }
        with self._world.together_raising():
            try:
                save_checkpoint(self._root, outcome.steps, state, extra)
            except DiskFullError as error:
                trainer.note(f"warning: no checkpoint of step {outcome.steps}, training goes on: {error}")
                return
        self.saved_step = outcome.steps

    def restore(self) -> Checkpoint | None:
        """Put the newest checkpoint back, if there is one.

        Raises:
            ConfigError: it is of other settings or data; names each and both values.
            CheckpointError: none can be read, or it is of another model.
        """
        with self._world.together_raising():
            found = latest_checkpoint(self._root)
            if found is None:
                return None
            _check_settings(found, self._settings)
        self._fill(found)
        self.saved_step = found.step
        return found

    def _fill(self, found: Checkpoint) -> None:
        trainer, world = self._trainer, self._world
        outcome = _outcome_from(found.extra["outcome"])
        _make_state(self._optimizer)
        best = _copy(self._model) if found.extra["best_weights"] else None
        counts = torch.from_numpy(ClickMetrics().counts())
        state = self._tensors(counts, best)
        step_ms = torch.zeros(outcome.steps, dtype=torch.float64)
        if world.is_first and outcome.steps:
            state["step_ms"] = step_ms
        with world.together_raising():
            found.load(state)
        # The tensors are the model's and the optimizer's own; this tells modules that watch for a load.
        self._model.load_state_dict(self._model.state_dict())
        _set_fbgemm_iteration(self._model, found.extra["fbgemm_iteration"])
        outcome.step_ms = array("d", step_ms.tolist())
        last = outcome.steps >= trainer.last_step
        if best is None and outcome.best is not None and not last:
            best = _copy(self._model)
        trainer.outcome, trainer.best_weights = outcome, best
        # What was merged when it was saved is one rank's from here on.
        trainer.train_metrics = ClickMetrics.from_counts(counts.numpy()) if world.is_first else ClickMetrics()

    def _tensors(self, train_metrics: torch.Tensor, best: dict[str, Any] | None) -> dict[str, Any]:
        state = {
            "model": self._model.state_dict(),
            "optimizer": as_on_one_process(
                self._optimizer.state_dict()["state"], self._trainer.outcome.steps
            ),
            "train_metrics": train_metrics,
        }
        return state if best is None else state | {"best_model": best}


def differing(before: RunConfig, now: RunConfig) -> list[str]:
    """The settings in which two runs differ, where that makes another run of it."""
    free = _FREE - {"epochs", "patience"}
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    return [key for key in new if key not in free and old[key] != new[key]]


def settings_of(
    config: RunConfig, log: ClickLog, world: World, column_shards: Mapping[str, list[int]]
) -> dict[str, Any]:
    """What a run and its continuation must have in common, by flag.

    Args:
        column_shards: of :func:`recemb.training.optimizer_state.column_shards`.
    """
    fixed = {key: value for key, value in config.model_dump(mode="json").items() if key not in _FREE}
    if config.limit_val_batches is not None or config.limit_test_batches is not None:
        # Which rows are evaluated depends on it.
        fixed["test_batch_size x ranks"] = (config.test_batch_size or config.batch_size) * world.size
    if config.optimizer == "rowwise_adagrad" and column_shards:
        fixed["column shards, each with row-wise Adagrad's sums of its own"] = dict(column_shards)
    if config.optimizer == "adam" and config.device == "cuda" and world.size > 1:
        # fbgemm's Adam, whose state and count of steps no other configuration has.
        fixed["adam of uncompressed tables"] = "fbgemm's, of several GPUs"
    return fixed | {
        "batch_size x ranks": config.batch_size * world.size,
        "data (features, rows, files)": fingerprint(log),
    }


def fingerprint(log: ClickLog) -> str:
    """What identifies the rows of a prepared log, wherever its directory is."""
    text = json.dumps({key: log.stats[key] for key in ("features", "rows", "files")}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _check_settings(found: Checkpoint, settings: Mapping[str, Any]) -> None:
    saved = found.extra["settings"]
    problems = [
        f"{name}: {saved.get(name)!r} in the checkpoint, {settings.get(name)!r} now"
        for name in dict.fromkeys([*settings, *saved])
        if saved.get(name) != settings.get(name)
    ]
    if problems:
        raise ConfigError(
            "\n  ".join(
                [
                    f"--resume: {found.path} is of a run with other settings; give the same (batch_size may "
                    "change with the number of ranks), or --overwrite to start anew:",
                    *problems,
                ]
            )
        )


def _copy(model: nn.Module) -> dict[str, Any]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Have torch make the state that it makes at a first step: one of zero gradients moves nothing."""
    assert isinstance(optimizer, CombinedOptimizer)
    for _, part in optimizer._optims:
        if isinstance(part, KeyedOptimizerWrapper):
            part.init_state()
    optimizer.zero_grad(set_to_none=True)


def _fbgemm_modules(model: nn.Module) -> list[SplitTableBatchedEmbeddingBagsCodegen]:
    return [module for module in model.modules() if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen)]


def _fbgemm_iteration(model: nn.Module) -> int:
    """fbgemm's count for the bias correction of Adam, which is in no state dict; equal in all modules."""
    return max((int(module.iter) for module in _fbgemm_modules(model)), default=0)


def _set_fbgemm_iteration(model: nn.Module, iteration: int) -> None:
    for module in _fbgemm_modules(model):
        module.iter.fill_(iteration)
        module.iter_cpu.fill_(iteration)


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    best = outcome.best
    return {
        "steps": outcome.steps,
        "epochs": outcome.epochs,
        "samples": outcome.samples,
        "train_seconds": outcome.train_seconds,
        "warm_up": asdict(outcome.warm_up),
        "evaluations": [_without_nan(asdict(evaluation)) for evaluation in outcome.evaluations],
        "best_step": best.step if best is not None else None,
    }


def _outcome_from(saved: Mapping[str, Any]) -> Outcome:
    evaluations = [_evaluation(each) for each in saved["evaluations"]]
    best = next((one for one in evaluations if one.step == saved["best_step"]), None)
    return Outcome(
        evaluations=evaluations,
        best=best,
        steps=saved["steps"],
        epochs=saved["epochs"],
        samples=saved["samples"],
        train_seconds=saved["train_seconds"],
        # Checkpoints of before it was counted do not have it.
        warm_up=WarmUp(**saved.get("warm_up", {})),
    )


def _cache_metrics(saved: Mapping[str, Any]) -> CacheMetrics:
    # Checkpoints of before it was counted do not have what was learned: each row counts as one.
    return CacheMetrics(**{"learned": float(saved["evictions"]) ** 0.5, **saved})


def _evaluation(saved: Mapping[str, Any]) -> Evaluation:
    parts = {
        "values": _metric_values(saved["values"]),
        "train": _metric_values(saved["train"]),
        "caches": {name: _cache_metrics(metrics) for name, metrics in saved["caches"].items()},
    }
    return Evaluation(**{**saved, **parts})


def _metric_values(saved: Mapping[str, Any]) -> MetricValues:
    values: dict[str, Any] = {key: math.nan if value is None else value for key, value in saved.items()}
    return MetricValues(**values)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
