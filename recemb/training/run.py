"""One training run, from configuration to run directory: ``recemb train`` without its flags."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from recemb.cache.metrics import CacheMetrics, total
from recemb.data.click_log import ClickLog
from recemb.errors import ConfigError, Interrupted, NonFiniteError
from recemb.planner.budget import METHODS, BudgetedTables
from recemb.stack import versions
from recemb.training.config import RunConfig, load_config
from recemb.training.distributed import World, joined
from recemb.training.environment import peak_rss_bytes, reset_peak_rss
from recemb.training.interrupt import StopRequest
from recemb.training.loop import Evaluation, Outcome, Trainer
from recemb.training.metrics import MetricValues
from recemb.training.run_dir import CONFIG_FILE, MetricsLog, RunDir
from recemb.training.seeds import deterministic_algorithms
from recemb.training.setup import (
    ClickBatches,
    build_model,
    build_optimizer,
    choose_tables,
    make_batches,
    open_log,
)
from recemb.training.sharded import build_sharded, whole_weights
from recemb.training.state import TrainerState, differing, fingerprint, settings_of


@dataclass(frozen=True)
class _Run:
    """What is fixed once a run has started.

    Attributes:
        above: the directory whose own run gives way to this one and its twin, or ``None``.
    """

    config: RunConfig
    directory: RunDir
    log: ClickLog
    tables: BudgetedTables
    world: World
    above: RunDir | None


@dataclass(frozen=True)
class _Built:
    """A model on this process or over all ranks, its optimizer, and where its tables are.

    Attributes:
        column_shards: the widths of tables that are cut by columns.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    sharding: dict[str, str] | None
    column_shards: dict[str, list[int]]


def train(config: RunConfig) -> list[Path]:
    """Train as configured and write the run directory, or two of them under it with ``compare``.

    With ``compare: dense`` the compressed run goes to ``<output>/<method>`` and its uncompressed twin (same
    data, seed, batches and initial dense layers) to ``<output>/dense``.

    Started by torchrun as one of several ranks, trains together with them; rank 0 writes the files, and every
    rank its part of the checkpoints.

    Returns:
        the run directories, in the order in which they were trained.

    Raises:
        ConfigError, DataError: before anything is trained or written.
        NonFiniteError: training stopped before a batch that would have destroyed the weights.
        Interrupted: a signal came; what had been reached by then is in the run directory.
        RankLost: another rank is gone, or a defect ended one.
    """
    with joined(config) as world:
        return _train_all(config, world)


def _train_all(config: RunConfig, world: World) -> list[Path]:
    root = Path(config.output)
    if config.compare is None:
        plans = [(config, RunDir(root))]
    else:
        single = config.model_copy(update={"compare": None})
        plans = [(single, RunDir(root / config.method)), (config.dense_twin(), RunDir(root / "dense"))]
    # Each machine may have the data in a place of its own; what is in it is compared below.
    world.check_equal("settings and versions", config.model_dump(exclude={"data_dir"}) | versions())
    # Everything that can be refused is refused before the first run starts.
    with world.agreeing():
        _check_nothing_hidden(config)
        # Unfinished ones first: their way out, --resume, keeps the complete ones as well.
        for part, directory in sorted(plans, key=lambda plan: plan[1].is_complete):
            directory.check_free(part.overwrite, part.resume)
        log = open_log(config)
        tables = [choose_tables(part, log) for part, _ in plans]
        _check_world(config, world)
    world.check_equal("data", {"features, rows and files": fingerprint(log)})
    above = RunDir(root) if config.compare is not None and config.overwrite else None
    runs = [
        _Run(part, directory, log, own, world, above)
        for (part, directory), own in zip(_begun(config, plans, world), tables, strict=True)
    ]
    with StopRequest() as stop:
        for run in runs:
            complete = world.exchange(run.config.resume and _is_complete(run))[0]
            if not complete:
                _train_one(run, stop)
            elif world.is_first:
                print(f"{run.directory.path} is complete; --resume leaves it as it is", file=sys.stderr)
    return [run.directory.path for run in runs]


def _begun(
    config: RunConfig, plans: list[tuple[RunConfig, RunDir]], world: World
) -> list[tuple[RunConfig, RunDir]]:
    """Note what ``--overwrite`` replaces; restarted ranks replace what is left of it, and resume the rest.

    Those have ``resume`` beside ``overwrite``: what they have reached themselves is not to be removed.
    """
    if not config.overwrite:
        return plans
    if not config.resume:
        for _, directory in plans:
            world.first(directory.mark_replaced)
        return plans
    # As rank 0 sees the files.
    replaced = world.exchange([directory.is_replaced for _, directory in plans])[0]
    return [
        (part.model_copy(update={"overwrite": anew, "resume": not anew}), directory)
        for (part, directory), anew in zip(plans, replaced, strict=True)
    ]


def _is_complete(run: _Run) -> bool:
    """Whether this very run has ended; one of other settings, or of fewer epochs, has not."""
    if not run.directory.is_complete:
        return False
    return not differing(load_config({}, run.directory.path / CONFIG_FILE), run.config)


def _check_nothing_hidden(config: RunConfig) -> None:
    """Refuse a run in a directory whose runs ``recemb report`` would no longer find because of it.

    What lies below may be runs of their own, so that ``--overwrite`` does not replace those.
    """
    root = RunDir(Path(config.output))
    if config.compare is not None:
        if root.holds_run and not config.overwrite:
            raise ConfigError(
                f"--output {root.path} already holds a run of its own, which recemb report would show in "
                "place of those of --compare; give another --output, or --overwrite to replace it"
            )
        return
    hidden = [method for method in METHODS if RunDir(root.path / method).holds_run]
    # A run to be resumed in such a directory hides them already.
    if hidden and not (config.resume and root.holds_run):
        raise ConfigError(
            f"--output {root.path} holds runs in {', '.join(hidden)}, as of --compare, which recemb report "
            "would no longer find there; give another --output, or move them away"
        )


def _remove_single(root: RunDir) -> None:
    """Remove the run that a ``--compare`` in its directory replaces."""
    if root.holds_run:
        root.claim()
        root.remove()


def _check_world(config: RunConfig, world: World) -> None:
    if world.size == 1 and config.plan is not None:
        raise ConfigError(
            f"--plan {config.plan} spreads tables over ranks and this is one process; start several, e.g. "
            "torchrun --standalone --nproc_per_node=2 -m recemb train ..., or remove it"
        )
    if world.size == 1 and config.communication_slices > 1:
        raise ConfigError(
            f"--communication_slices {config.communication_slices} is of what ranks send each other and this "
            "is one process; start several, e.g. with --nproc_per_node 2, or remove it"
        )


def _train_one(run: _Run, stop: StopRequest) -> None:
    config, directory, world = run.config, run.directory, run.world
    reset_peak_rss()
    with deterministic_algorithms(config.device):
        built = _build(run)
        batches = make_batches(config, run.log, world.rank, world.size)
        trainer = Trainer(
            config,
            built.model,
            built.optimizer,
            batches,
            stop,
            lambda evaluation: metrics.add(_metrics_record(evaluation)),
            world,
            lambda: state.save(),
        )
        metrics = MetricsLog(directory, trainer.note)
        settings = settings_of(config, run.log, world, built.column_shards)
        state = TrainerState(directory.checkpoints, trainer, built.model, built.optimizer, settings, world)
        _open(run, state, trainer)
        try:
            outcome = trainer.train()
        except NonFiniteError as error:
            if world.size > 1 and not world.together:
                # Found by the one rank that has the table, in a look-up that the others wait for: they cannot
                # take part in gathering weights, and learn of it over the link.
                raise
            world.first(metrics.flush)
            kept = _keep_best(run, built.model, trainer.outcome)
            raise NonFiniteError(f"{error}\n{kept}") from error
        test = trainer.test() if outcome.interrupted is None else None
    _save_weights(run, built.model, _checkpoint_metadata(outcome))
    caches = trainer.cache_metrics()
    world.first(metrics.flush)
    world.first(lambda: directory.write_result(_result(run, outcome, test, caches, built.sharding, batches)))
    if outcome.interrupted is not None:
        world.together = True
        again = "--overwrite to train again"
        if state.saved_step is not None:
            again = f"--resume to go on from step {state.saved_step}, or {again}"
        raise Interrupted(
            f"{outcome.interrupted} came after step {outcome.steps}; weights and figures so far are in "
            f"{directory.path}. Give the same command with {again}"
        )


def _build(run: _Run) -> _Built:
    if run.world.size > 1:
        sharded = build_sharded(run.config, run.log, run.tables, run.world)
        return _Built(sharded.model, sharded.optimizer, sharded.sharding, sharded.column_shards)
    model = build_model(run.config, run.log, run.tables)
    return _Built(model, build_optimizer(run.config, model), None, {})


def _open(run: _Run, state: TrainerState, trainer: Trainer) -> None:
    """Prepare the run directory: to go on from its newest checkpoint if that is asked for, else anew."""
    # Whoever trains from this file again should not lose this run by it.
    yaml = run.config.model_copy(update={"overwrite": False, "resume": False}).to_yaml()
    run.world.first(run.directory.claim)
    found = state.restore() if run.config.resume else None
    if run.config.resume and found is None:
        run.world.first(run.directory.check_nothing_lost)
    if run.above is not None:
        above = run.above
        run.world.first(lambda: _remove_single(above))
    if found is None:
        run.world.first(lambda: run.directory.create(yaml))
    else:
        records = [_metrics_record(evaluation) for evaluation in trainer.outcome.evaluations]
        run.world.first(lambda: run.directory.resume(yaml, records))
    if run.world.is_first:
        _announce(run)
        if run.config.resume:
            where = f"going on from {found.path}" if found else "no checkpoint to resume from; starting anew"
            print(f"{run.config.method}: {where}", file=sys.stderr)


def _save_weights(run: _Run, model: nn.Module, metadata: dict[str, str]) -> None:
    """Write the current weights, gathered from all ranks."""
    weights = whole_weights(model, run.world) if run.world.size > 1 else model
    run.world.first(lambda: run.directory.save_weights(weights, metadata))


def _announce(run: _Run) -> None:
    total = run.tables.memory.total
    lines = [
        f"{run.config.method}: {len(run.tables.tables)} tables, {total.num_embeddings:,} rows, "
        f"{total.num_bytes / 1e6:,.2f} MB instead of {total.dense_bytes / 1e6:,.2f} MB ({total.ratio:.1f}x)"
    ]
    if run.world.size > 1:
        batch, size = run.config.batch_size, run.world.size
        lines.append(
            f"{run.config.method}: {size} ranks on {run.config.device}, {size} x {batch:,} = "
            f"{size * batch:,} rows a step"
        )
    if run.tables.shortfall is not None:
        lines.append(f"{run.config.method}: note: {run.tables.shortfall}")
    print("\n".join(lines), file=sys.stderr)


def _keep_best(run: _Run, model: nn.Module, outcome: Outcome) -> str:
    """Save the best weights of a run that cannot go on, and say where they are."""
    if outcome.best is None:
        return "No evaluation had been made by then, so there is no checkpoint."
    _save_weights(run, model, _checkpoint_metadata(outcome))
    return f"The best weights, of step {outcome.best.step}, are in {run.directory.checkpoint}."


def _checkpoint_metadata(outcome: Outcome) -> dict[str, str]:
    step = outcome.best.step if outcome.best is not None else outcome.steps
    return {"format": "pt", "step": str(step), **{f"version.{k}": v for k, v in versions().items()}}


def _metrics_record(evaluation: Evaluation) -> dict[str, object]:
    return {
        "step": evaluation.step,
        "epoch": evaluation.epoch,
        "samples": evaluation.samples,
        "split": evaluation.split,
        **asdict(evaluation.values),
        "best": evaluation.best,
        "train_auc": evaluation.train.auc,
        "train_logloss": evaluation.train.logloss,
        "evaluation_seconds": evaluation.seconds,
        **_cache_figures(evaluation.caches),
    }


def _cache_figures(caches: Mapping[str, CacheMetrics]) -> dict[str, object]:
    """All caches together, and nothing without one."""
    return (
        {f"cache_{name}": value for name, value in asdict(total(caches.values())).items()} if caches else {}
    )


def _result(
    run: _Run,
    outcome: Outcome,
    test: MetricValues | None,
    caches: Mapping[str, CacheMetrics],
    sharding: dict[str, str] | None,
    batches: ClickBatches,
) -> dict[str, Any]:
    """``result.json``: the figures of the best weights, on the test split if there is one, else on val.

    ``step_ms_*`` and ``samples_per_second`` count reading, forward, backward and update, not evaluation, and
    leave each process's first step out, in which kernels are compiled; ``train_seconds`` counts it. Samples
    are those of all ranks, and step times and ``peak_rss_bytes`` are rank 0's.
    """
    best = outcome.best
    values = test if test is not None else best.values if best is not None else None
    memory, stats = run.tables.memory, run.log.stats
    step_ms = outcome.warm_step_ms
    return {
        "auc": values.auc if values else None,
        "logloss": values.logloss if values else None,
        "ne": values.ne if values else None,
        "calibration": values.calibration if values else None,
        "embedding_bytes": memory.total.num_bytes,
        "dense_embedding_bytes": memory.total.dense_bytes,
        "compression_ratio": memory.total.ratio,
        "samples_per_second": outcome.samples_per_second,
        "step_ms_p50": float(np.median(step_ms)) if step_ms.size else None,
        "peak_rss_bytes": peak_rss_bytes(),
        "seed": run.config.seed,
        "versions": versions(),
        "status": "interrupted" if outcome.interrupted else "completed",
        "stopped": outcome.stopped,
        "method": run.config.method,
        "compress_rate": run.config.compress_rate,
        "shortfall": run.tables.shortfall,
        "split": "test" if test is not None else "val" if best is not None else None,
        "num_samples": values.num_samples if values else 0,
        "auc_error_bound": values.auc_error_bound if values else None,
        "val": asdict(best.values) if best is not None else None,
        "test": asdict(test) if test is not None else None,
        "best_step": best.step if best is not None else None,
        "steps": outcome.steps,
        "epochs": outcome.epochs,
        "train_samples": outcome.samples,
        "train_seconds": outcome.train_seconds,
        "step_ms_p80": float(np.percentile(step_ms, 80)) if step_ms.size else None,
        "num_threads": torch.get_num_threads(),
        "world_size": run.world.size,
        "sharding": sharding,
        "data": fingerprint(run.log),
        "steps_per_epoch": batches.count("train"),
        "limited_rows": batches.limited_rows(),
        "dataset_name": stats.get("dataset_name"),
        "best_auc": stats.get("best_auc"),
        "best_logloss": stats.get("best_logloss"),
        "tables": [{**asdict(record), "ratio": record.ratio} for record in memory],
        **_cache_figures(caches),
        "caches": {name: asdict(metrics) for name, metrics in caches.items()},
    }
