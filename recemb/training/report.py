"""Finished runs side by side: one line per setting, seeds aggregated, accuracy loss paired by seed.

A setting is a configuration without its seed and paths. Its loss against dense is taken seed by seed from
the dense run of the same configuration and seed, then averaged: the spread between seeds (0.001 to 0.002
AUC on small logs) is larger than the differences of interest, and most of it is common to both runs.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from recemb.errors import ConfigError, DataError
from recemb.planner.report import wrapped
from recemb.training.run_dir import CONFIG_FILE, METRICS_FILE, RESULT_FILE
from recemb.training.yaml_file import read_yaml

# Keys of a configuration that do not change what is trained, and those that say how tables are stored.
_IDENTITY_KEYS = frozenset({"output", "overwrite", "compare", "seed"})
_COMPRESSION_KEYS = frozenset(
    {
        *("method", "compress_rate", "method_threshold"),
        *("cache_fraction", "cache_policy", "cache_refresh_every"),
    }
)
_SEARCH_DEPTH = 3
TABLE_WIDTH = 100
_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class Run:
    """One run directory, read back.

    ``result`` is result.json, ``config`` resolved_config.yaml, ``curve`` the lines of metrics.jsonl.
    """

    path: Path
    result: dict[str, Any]
    config: dict[str, Any]
    curve: tuple[dict[str, Any], ...]

    @property
    def setting(self) -> str:
        """Equal for runs that differ in their seed and paths alone."""
        return _key(self.config, _IDENTITY_KEYS)

    @property
    def twin(self) -> tuple[str, int]:
        """Equal for a run and the dense run that it is compared with."""
        return _key(self.config, _IDENTITY_KEYS | _COMPRESSION_KEYS), int(self.result["seed"])


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
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.setting, []).append(run)
    names = _names(list(groups.values()))
    settings = [
        _summarise(name, group, dense_auc) for name, group in zip(names, groups.values(), strict=True)
    ]
    return sorted(settings, key=lambda setting: (setting.method != "dense", -setting.embedding_bytes))


def comparison_table(runs: Sequence[Run]) -> str:
    """The comparison as text of at most 100 columns; a path that is longer stays in one piece."""
    header = ("run", "method", "emb. MB", "ratio", "AUC", "ΔAUC", "logloss", "samples/s", "ms/step")
    settings = summarise(runs)
    rows = [header, *(_row(setting) for setting in settings)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    gaps = len(widths) - 1
    gap = "  " if sum(widths) + 2 * gaps <= TABLE_WIDTH else " "
    # Names alone have no bound, so they give way.
    widths[0] = max(8, min(widths[0], TABLE_WIDTH - sum(widths[1:]) - len(gap) * gaps))
    lines = [gap.join(_cells(row, widths)).rstrip() for row in rows]
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
        notes.append("ΔAUC: against the dense run of the same seed and configuration")
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
    return Run(path, result, read_yaml(path / CONFIG_FILE).values, curve)


def _key(config: dict[str, Any], without: frozenset[str]) -> str:
    return json.dumps({key: value for key, value in config.items() if key not in without}, sort_keys=True)


def _names(groups: Sequence[list[Run]]) -> list[str]:
    """What tells the settings apart: method, rate and cache, else the directory too."""
    short = []
    for group in groups:
        rate = group[0].config.get("compress_rate")
        count = len(_seeds(group))
        seeds = f" (n={count})" if count > 1 else ""
        cached = group[0].config.get("cache_fraction")
        cache = f" cache {cached:.3g}" if cached else ""
        policy = group[0].config.get("cache_policy") if cached else None
        cache += f" {policy}" if policy else ""
        short.append(f"{group[0].result['method']}{f' {rate:g}x' if rate else ''}{cache}{seeds}")
    return [
        name if short.count(name) == 1 else f"{group[0].path.name}: {name}"
        for name, group in zip(short, groups, strict=True)
    ]


def _seeds(runs: Iterable[Run]) -> set[int]:
    return {int(run.result["seed"]) for run in runs}


def _per_key(pairs: Iterable[tuple[_Key, float | None]]) -> dict[_Key, float]:
    """The mean of each key's known values: equal runs can differ in the last digits, on a GPU for example."""
    known: dict[_Key, list[float]] = {}
    for key, value in pairs:
        if value is not None:
            known.setdefault(key, []).append(value)
    return {key: statistics.fmean(values) for key, values in known.items()}


def _summarise(name: str, runs: list[Run], dense_auc: dict[tuple[str, int], float]) -> Setting:
    def spread(value: Callable[[Run], float | None]) -> Spread | None:
        # A repeated run is no second sample: it would shrink the deviation over seeds.
        return Spread.of(_per_key((int(run.result["seed"]), value(run)) for run in runs).values())

    def loss(run: Run) -> float | None:
        dense = dense_auc.get(run.twin)
        known = dense is not None and run.result["auc"] is not None and run.result["method"] != "dense"
        return run.result["auc"] - dense if known else None

    first = runs[0].result
    return Setting(
        name=name,
        method=first["method"],
        runs=tuple(runs),
        seeds=len(_seeds(runs)),
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


def _cells(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    name = row[0] if len(row[0]) <= widths[0] else f"{row[0][: widths[0] - 1]}…"
    first = [name.ljust(widths[0]), row[1].ljust(widths[1])]
    return first + [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
