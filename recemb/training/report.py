"""Finished runs side by side: one line per setting, seeds aggregated, accuracy loss paired by seed.

A setting is what decides a run's figures (:mod:`recemb.training.run_settings`), without the seed. Its loss
against dense is taken seed by seed from the dense run of the same training and seed, then averaged: the
spread between seeds (0.001 to 0.002 AUC on small logs) is larger than the differences of interest, and most
of it is common to both runs.
"""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from recemb.errors import ConfigError, DataError
from recemb.planner.report import wrapped
from recemb.training.config import RunConfig, parse_config
from recemb.training.run_dir import CONFIG_FILE, METRICS_FILE, RESULT_FILE
from recemb.training.run_settings import (
    Settings,
    difference,
    labels,
    placement_settings,
    storage_settings,
    training_settings,
)
from recemb.training.yaml_file import read_yaml

_SEARCH_DEPTH = 3
TABLE_WIDTH = 100
_Key = TypeVar("_Key", bound=Hashable)
_Twin = tuple[frozenset[tuple[str, Hashable]], int]


@dataclass(frozen=True)
class Run:
    """One run directory, read back.

    ``result`` is result.json, ``config`` resolved_config.yaml, ``curve`` the lines of metrics.jsonl.
    """

    path: Path
    result: dict[str, Any]
    config: RunConfig
    curve: tuple[dict[str, Any], ...]

    @property
    def seed(self) -> int:
        return int(self.result["seed"])

    @cached_property
    def training(self) -> Settings:
        """Equal for a run and the dense run that it is compared with, as the seed is."""
        return training_settings(self.config, self.result)

    @cached_property
    def settings(self) -> Settings:
        """Equal for runs that differ in nothing but the seed."""
        placement = placement_settings(self.config, self.result)
        return storage_settings(self.config) | self.training | placement

    @property
    def twin(self) -> _Twin:
        """Equal for a run and the dense run that it is compared with."""
        return _key(self.training), self.seed


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; ``std`` is ``None`` for a single one."""

    mean: float
    std: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Over the values that are known, ``None`` when none is."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))

    def text(self, digits: int, sign: str = "") -> str:
        """``0.7512`` or ``0.7512±.0011``."""
        if not math.isfinite(self.mean):
            return "-"
        body = f"{self.mean:{sign}.{digits}f}"
        if self.std is None:
            return body
        spread = f"{self.std:.{digits}f}"
        return f"{body}±{spread.removeprefix('0') if digits else spread}"


@dataclass(frozen=True)
class Setting:
    """The runs of one setting and what is compared of them, each seed counted once.

    Attributes:
        seeds: how many different ones; fewer than ``runs`` where a run was repeated, as the dense run of
            every ``--compare`` is.
    """

    name: str
    method: str
    runs: tuple[Run, ...]
    seeds: int
    embedding_bytes: int
    ratio: float
    auc: Spread | None
    auc_loss: Spread | None
    logloss: Spread | None
    samples_per_second: Spread | None
    step_ms: Spread | None


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run directories; a directory without a result stands for the runs below it.

    Raises:
        ConfigError: a path holds no finished run.
        DataError: a file of a run cannot be read.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if (path / RESULT_FILE).is_file():
            here = [path / RESULT_FILE]
        else:
            patterns = ["*/" * depth + RESULT_FILE for depth in range(1, _SEARCH_DEPTH + 1)]
            here = sorted(match for pattern in patterns for match in path.glob(pattern))
        if not here:
            raise ConfigError(
                f"{path} holds no finished run ({RESULT_FILE} is missing); give a run of recemb train"
            )
        found.update(dict.fromkeys(result.parent for result in here))
    return [_load(path) for path in found]


def summarise(runs: Sequence[Run]) -> list[Setting]:
    """One entry per setting: dense first, then by falling embedding bytes."""
    dense_auc = _per_key((run.twin, run.result["auc"]) for run in runs if run.result["method"] == "dense")
    groups: dict[Hashable, list[Run]] = {}
    for run in runs:
        groups.setdefault(_key(run.settings), []).append(run)
    first = [group[0] for group in groups.values()]
    names = labels([run.settings for run in first], [run.path for run in first])
    settings = [
        _summarise(name, group, dense_auc) for name, group in zip(names, groups.values(), strict=True)
    ]
    return sorted(settings, key=lambda setting: (setting.method != "dense", -setting.embedding_bytes))


def comparison_table(runs: Sequence[Run]) -> str:
    """The comparison as text of at most 100 columns; in the notes a longer path stays in one piece."""
    header = ("run", "method", "emb. MB", "ratio", "AUC", "ΔAUC", "logloss", "samples/s", "ms/step")
    settings = summarise(runs)
    rows = [header, *(_row(setting) for setting in settings)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    gaps = len(widths) - 1
    gap = "  " if sum(widths) + 2 * gaps <= TABLE_WIDTH else " "
    # Names alone have no bound, so they go on below.
    widths[0] = max(8, min(widths[0], TABLE_WIDTH - sum(widths[1:]) - len(gap) * gaps))
    lines = [line for row in rows for line in _lines(row, widths, gap)]
    lines.insert(1, "-" * max(map(len, lines)))
    notes = [line for note in footnotes(runs, settings) for line in wrapped(note)]
    return "\n".join([*lines, *notes])


def footnotes(runs: Sequence[Run], settings: Sequence[Setting]) -> list[str]:
    """What a reader must know to read the table: split, paired seeds, the best possible AUC, shortfalls."""
    notes = []
    splits = sorted({str(run.result["split"]) for run in runs if run.result["split"]})
    if splits:
        notes.append(f"AUC and logloss on the {' and '.join(splits)} split, best weights on validation")
    if any(setting.auc_loss is not None and setting.method != "dense" for setting in settings):
        notes.append("ΔAUC: against the dense run of the same seed and training settings")
    notes += _unpaired(settings)
    if any(setting.seeds > 1 for setting in settings):
        notes.append("±: sample standard deviation over n seeds")
    best = sorted({run.result["best_auc"] for run in runs if run.result.get("best_auc") is not None})
    if best:
        known = ", ".join(f"{value:.4f}" for value in best)
        notes.append(
            f"best possible AUC on this log (it is synthetic, its click probabilities are known): {known}"
        )
    for run in runs:
        if run.result.get("shortfall"):
            notes.append(f"{run.result['method']}: {run.result['shortfall']}")
        if run.result["status"] != "completed":
            notes.append(f"{run.path}: {run.result['status']} after step {run.result['steps']}")
    return list(dict.fromkeys(notes))


def _load(path: Path) -> Run:
    try:
        result = json.loads((path / RESULT_FILE).read_text(encoding="utf-8"))
        lines = (path / METRICS_FILE).read_text(encoding="utf-8") if (path / METRICS_FILE).exists() else ""
        curve = tuple(json.loads(line) for line in lines.splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a run ({error}); train it again") from error
    needed = ("auc", "logloss", "embedding_bytes", "compression_ratio", "seed", "method", "status", "split")
    missing = [key for key in needed if not isinstance(result, dict) or key not in result]
    if missing:
        raise DataError(f"{path / RESULT_FILE}: lacks {', '.join(missing)}; train it again")
    document = read_yaml(path / CONFIG_FILE)
    # Another version's may have more.
    values = {key: value for key, value in document.values.items() if key in RunConfig.model_fields}
    return Run(path, result, parse_config(values, document), curve)


def _key(settings: Settings) -> frozenset[tuple[str, Hashable]]:
    return frozenset(settings.items())


def _unpaired(settings: Sequence[Setting]) -> list[str]:
    """Why runs have no ΔAUC although there are dense runs: what the most similar of them has otherwise."""
    dense = [(setting, run) for setting in settings if setting.method == "dense" for run in setting.runs]
    paired = {run.twin for _, run in dense if run.result["auc"] is not None}
    notes = []
    for setting in settings if dense else ():
        if setting.method == "dense":
            continue
        seeds = []
        for run in setting.runs:
            if run.result["auc"] is None or run.twin in paired:
                continue
            nearest, found = min(
                ((other, difference(twin.training, run.training)) for other, twin in dense),
                key=lambda pair: len(pair[1]),
            )
            if found:
                notes.append(f"no ΔAUC for {setting.name}: {nearest.name} differs in {', '.join(found)}")
            else:
                seeds.append(run.seed)
        if seeds:
            which = ", ".join(map(str, sorted(set(seeds))))
            notes.append(f"ΔAUC of {setting.name}: no dense run of seed {which} has an AUC")
    return notes


def _per_key(pairs: Iterable[tuple[_Key, float | None]]) -> dict[_Key, float]:
    """The mean of each key's known values: equal runs can differ in the last digits, on a GPU for example."""
    known: dict[_Key, list[float]] = {}
    for key, value in pairs:
        if value is not None:
            known.setdefault(key, []).append(value)
    return {key: statistics.fmean(values) for key, values in known.items()}


def _summarise(name: str, runs: list[Run], dense_auc: dict[_Twin, float]) -> Setting:
    def spread(value: Callable[[Run], float | None]) -> Spread | None:
        # A repeated run is no second sample: it would shrink the deviation over seeds.
        return Spread.of(_per_key((run.seed, value(run)) for run in runs).values())

    def loss(run: Run) -> float | None:
        dense = dense_auc.get(run.twin)
        known = dense is not None and run.result["auc"] is not None and run.result["method"] != "dense"
        return run.result["auc"] - dense if known else None

    first, seeds = runs[0].result, len({run.seed for run in runs})
    return Setting(
        name=f"{name} (n={seeds})" if seeds > 1 else name,
        method=first["method"],
        runs=tuple(runs),
        seeds=seeds,
        embedding_bytes=first["embedding_bytes"],
        ratio=first["compression_ratio"],
        auc=spread(lambda run: run.result["auc"]),
        auc_loss=spread(loss),
        logloss=spread(lambda run: run.result["logloss"]),
        samples_per_second=spread(lambda run: run.result.get("samples_per_second")),
        step_ms=spread(lambda run: run.result.get("step_ms_p50")),
    )


def _row(setting: Setting) -> tuple[str, ...]:
    def text(spread: Spread | None, digits: int, sign: str = "") -> str:
        return "-" if spread is None else spread.text(digits, sign)

    def mean(spread: Spread | None, digits: int) -> str:
        return "-" if spread is None else f"{spread.mean:,.{digits}f}"

    return (
        setting.name,
        setting.method,
        f"{setting.embedding_bytes / 1e6:,.2f}",
        f"{setting.ratio:,.{0 if setting.ratio >= 1000 else 1}f}x",
        text(setting.auc, 4),
        text(setting.auc_loss, 4, "+"),
        text(setting.logloss, 4),
        mean(setting.samples_per_second, 0),
        mean(setting.step_ms, 1),
    )


def _lines(row: Sequence[str], widths: Sequence[int], gap: str) -> list[str]:
    name, *below = textwrap.wrap(row[0], widths[0], subsequent_indent="  ", break_on_hyphens=False)
    cells = [name.ljust(widths[0]), row[1].ljust(widths[1])]
    cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
    return [gap.join(cells).rstrip(), *below]
