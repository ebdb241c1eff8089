"""AUC of tensor trains with and without hot rows on a prepared click log, paired by seed."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.accuracy import train_all
from recemb.backends.memory import memory_report
from recemb.spec import Dense, HotRows
from recemb.training.config import parse_config
from recemb.training.report import Run, load_runs
from recemb.training.setup import choose_tables, open_log


@dataclass(frozen=True)
class AucRow:
    """One setting over its seeds.

    Args:
        lost: mean of AUC minus dense of the same seed, and its sample deviation.
        gained: mean of AUC minus the trains without a cache of the same seed, and its deviation.
        recovered: ``gained`` over what those trains lose against dense.
    """

    setting: str
    policy: str
    fraction: float
    seeds: int
    embedding_bytes: int
    compression_ratio: float
    hit_rate: float | None
    evictions: float | None
    write_back_error: float | None
    auc: float
    auc_std: float
    lost: float
    lost_std: float
    gained: float
    gained_std: float
    recovered: float | None
    step_ms_p50: float | None


def auc_rows(args: argparse.Namespace) -> list[AucRow]:
    """Train what is not trained yet and read the results."""
    base = ["--method", "tt", "--compress_rate", f"{args.compress_rate:g}"]
    settings: dict[str, list[str]] = {"dense": [], "tt": base}
    for fraction in args.fractions:
        rate = f"{_rate_with_cache(args, fraction):.5g}"
        for policy in args.policies:
            cache = ["--cache_fraction", f"{fraction:g}", "--cache_policy", policy]
            settings[f"tt+cache-{fraction:g}-{policy}"] = ["--method", "tt", "--compress_rate", rate, *cache]
        settings[f"tt-bytes-of-{fraction:g}"] = ["--method", "tt", "--compress_rate", rate]
    jobs = [
        (args.runs / name / f"seed-{seed}", [*flags, "--seed", str(seed)])
        for seed in range(args.seeds)
        for name, flags in settings.items()
    ]
    train_all(jobs, ["--data_dir", args.data_dir, *args.train.split()], args.jobs)
    runs = {name: load_runs([args.runs / name / f"seed-{s}" for s in range(args.seeds)]) for name in settings}
    aucs = {name: [float(run.result["auc"]) for run in found] for name, found in runs.items()}
    return [_row(name, runs[name], aucs) for name in settings]


def _rate_with_cache(args: argparse.Namespace, fraction: float) -> float:
    """The rate at which the trains of ``compress_rate`` and a cache together come."""
    given: dict[str, Any] = {"data_dir": args.data_dir, "output": str(args.runs)}
    config = parse_config(given | {"method": "tt", "compress_rate": args.compress_rate})
    tables = choose_tables(config, open_log(config)).tables
    cache = HotRows(fraction=fraction)
    cached = [
        table
        if isinstance(table.compression, Dense)
        else replace(table, compression=replace(table.compression, cache=cache))
        for table in tables
    ]
    return memory_report(cached).total.ratio


def _row(name: str, runs: Sequence[Run], aucs: dict[str, list[float]]) -> AucRow:
    own, dense, plain = aucs[name], aucs["dense"], aucs["tt"]
    lost = [a - b for a, b in zip(own, dense, strict=True)]
    gained = [a - b for a, b in zip(own, plain, strict=True)]
    gap = statistics.fmean(dense) - statistics.fmean(plain)
    first, results = runs[0].result, [run.result for run in runs]
    cached = first.get("cache_rows") is not None
    times = [float(r["step_ms_p50"]) for r in results if r["step_ms_p50"] is not None]

    def mean(key: str) -> float | None:
        return statistics.fmean(float(r[key]) for r in results) if cached else None

    return AucRow(
        setting=name,
        policy=runs[0].config.cache_policy or "",
        fraction=runs[0].config.cache_fraction or 0.0,
        seeds=len(runs),
        embedding_bytes=int(first["embedding_bytes"]),
        compression_ratio=float(first["compression_ratio"]),
        hit_rate=mean("cache_hit_rate"),
        evictions=mean("cache_evictions"),
        write_back_error=mean("cache_write_back_error"),
        auc=statistics.fmean(own),
        auc_std=_deviation(own),
        lost=statistics.fmean(lost),
        lost_std=_deviation(lost),
        gained=statistics.fmean(gained),
        gained_std=_deviation(gained),
        recovered=statistics.fmean(gained) / gap if gap > 0 else None,
        step_ms_p50=statistics.fmean(times) if times else None,
    )


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def auc_table(rows: Sequence[AucRow]) -> str:
    """The figures as text."""
    lines = [
        f"{'setting':<28}{'KB':>8}{'ratio':>8}{'hits':>7}{'AUC':>9}{'vs dense':>17}{'vs tt':>17}{'back':>7}"
    ]
    for r in rows:
        hits = "" if r.hit_rate is None else f"{r.hit_rate:.0%}"
        back = "" if r.recovered is None else f"{r.recovered:.0%}"
        lines.append(
            f"{r.setting:<28}{r.embedding_bytes / 1e3:>8,.0f}{r.compression_ratio:>7.1f}x{hits:>7}"
            f"{r.auc:>9.4f}"
            f"{f'{r.lost:+.4f} ± {r.lost_std:.4f}':>17}{f'{r.gained:+.4f} ± {r.gained_std:.4f}':>17}{back:>7}"
        )
    return "\n".join([*lines, f"{rows[0].seeds} seeds, paired; back: part of the loss of tt against dense"])
