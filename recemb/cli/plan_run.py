"""What ``recemb plan`` does once its flags are read; imports torch and torchrec."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

from recemb.backends.memory import memory_report
from recemb.errors import ConfigError, PlanError
from recemb.planner.budget import BudgetedTables, compress
from recemb.planner.costs import Costs, default_costs, read_costs
from recemb.planner.presets import PRESETS
from recemb.planner.report import PlanLine, milliseconds, plan_block, rank_block, table_block, wrapped
from recemb.spec import Dense
from recemb.torchrec_io.planning.change import fitting_changes
from recemb.torchrec_io.planning.plan_file import plan_document, save_plan
from recemb.torchrec_io.planning.planned import Planned, Ranks, Request, plan_tables
from recemb.torchrec_io.planning.summary import (
    LEGEND,
    baseline_lines,
    bottleneck,
    estimate,
    method_of,
    plan_line,
    rank_lines,
    reasons,
    table_lines,
)
from recemb.units import size

_RANKS_SHOWN = 16
_FITTED = 12
# What the command prints before an error.
_PREFIX = "recemb plan: error: "


@dataclass(frozen=True)
class _Model:
    """A model as asked for."""

    name: str
    budget: BudgetedTables
    method: str
    compress_rate: float
    method_threshold: int
    pooling_factors: tuple[float, ...]
    batch_size: int
    optimizer: str
    device: str


def plan(args: argparse.Namespace, local_world_size: int) -> str:
    """Plan a model, write the plan, and return what is printed.

    Raises:
        PlanError: the tables do not fit.
    """
    model = _from_preset(args) if args.preset else _from_config(args)
    if args.hbm is not None and model.device == "cpu":
        raise ConfigError(f"--hbm {args.hbm}: a CPU's tables lie in DDR; give --ddr, or --device cuda")
    costs = costs_of(args, model.device)
    request = Request(
        model.budget.tables,
        model.pooling_factors,
        model.batch_size,
        model.optimizer,
        Ranks(
            args.world_size,
            local_world_size,
            args.hbm or 80 * 10**9,
            args.ddr or 128 * 10**9,
            args.reserved,
        ),
        costs,
    )
    planned = plan_tables(request)
    if planned.plan is None:
        raise PlanError(_too_large(planned, model))
    compressed = any(not isinstance(table.compression, Dense) for table in request.tables)
    name = f"{model.method} {model.compress_rate:g}x" if compressed else "dense"
    lines = [plan_line(f"{name}, this plan", planned.found.placement)]
    if compressed:
        dense = tuple(replace(table, compression=Dense()) for table in request.tables)
        other = plan_tables(replace(request, tables=dense))
        lines.append(plan_line("dense", other.found.placement))
    lines += baseline_lines(name, planned)
    figures = estimate(planned, lines) | {"shortfall": model.budget.shortfall}
    document = plan_document(planned, figures)
    if args.output:
        save_plan(Path(args.output), document)
    if args.format == "json":
        return json.dumps(document.model_dump(mode="json", exclude_none=True), indent=1)
    return "\n".join(_text(planned, model, lines, args.top))


def costs_of(args: argparse.Namespace, device: str) -> Costs:
    """The constants that the flags name."""
    if args.costs is None:
        return default_costs(device, args.hardware)
    costs = read_costs(Path(args.costs))
    if args.hardware is not None:
        raise ConfigError("--costs and --hardware are both given; keep one")
    if costs.device != device:
        raise ConfigError(f"{args.costs} was measured on {costs.device} and --device is {device}")
    return costs


def _from_preset(args: argparse.Namespace) -> _Model:
    preset = PRESETS[args.preset]()
    method, threshold = (
        args.method or "dense",
        200 if args.method_threshold is None else args.method_threshold,
    )
    rate = _rate_of(method, args.compress_rate)
    return _Model(
        args.preset,
        compress(preset.tables, method, rate, threshold),
        method,
        rate,
        threshold,
        preset.pooling_factors,
        args.batch_size or max(1, preset.global_batch_size // args.world_size),
        args.optimizer or "rowwise_adagrad",
        args.device or "cpu",
    )


def _rate_of(method: str, rate: float | None) -> float:
    if method == "dense":
        if rate not in (None, 1.0):
            raise ConfigError(
                f"--compress_rate {rate:g}: method is dense; choose --method tt, qr, robe or md"
            )
        return 1.0
    if rate is None:
        raise ConfigError(f"--method {method} needs --compress_rate: how many times smaller, e.g. 100")
    return rate


def _from_config(args: argparse.Namespace) -> _Model:
    from recemb.training.config import load_config
    from recemb.training.setup import choose_tables, open_log

    names = ("method", "compress_rate", "method_threshold", "batch_size", "optimizer", "device")
    flags = {name: str(getattr(args, name)) for name in names if getattr(args, name) is not None}
    # A run's own directory is not needed to plan it.
    config = load_config({**flags, "output": "plan"}, Path(args.config))
    budget = choose_tables(config, open_log(config))
    return _Model(
        str(args.config),
        budget,
        config.method,
        config.compress_rate or 1.0,
        config.method_threshold,
        (1.0,) * len(budget.tables),
        config.batch_size,
        config.optimizer,
        config.device,
    )


def _text(planned: Planned, model: _Model, lines: list[PlanLine], top: int) -> list[str]:
    request, found = planned.request, planned.found
    ranks, figures = request.ranks, rank_lines(planned)
    hosts = ranks.world_size // ranks.local_world_size
    memory = f"{size(ranks.hbm)} HBM and " if request.costs.device == "cuda" else ""
    text = [
        f"{model.name}: {len(request.tables)} tables, {model.method} at {model.compress_rate:g}x, on "
        f"{_ranks_of(ranks.world_size)} ({request.costs.device}, {hosts} host{'s' if hosts > 1 else ''})",
        f"each: batch {request.batch_size:,}, {memory}{size(ranks.ddr)} DDR; {ranks.reserved:.0%} and "
        f"{size(planned.workspace)} of workspace kept free",
        f"optimizer {model.optimizer}; costs: {request.costs.name}",
        "",
        *table_block(table_lines(planned), top),
        LEGEND,
        "",
        *rank_block(figures, _RANKS_SHOWN),
        *wrapped(bottleneck(planned, figures)),
        *(line for reason in reasons(planned) for line in wrapped(reason)),
        "",
        *plan_block(lines),
        "",
        f"no plan is faster than {milliseconds(found.bound)} ms: this one is within {found.gap:.1%}",
        f"planned in {planned.seconds:.1f} s: {found.options_before:,} options, {found.options_after:,} "
        f"after pruning dominated ones, {found.tried} choices placed",
    ]
    if model.budget.shortfall:
        text += wrapped(f"note: {model.budget.shortfall}")
    return text


def _ranks_of(world_size: int) -> str:
    return "1 rank" if world_size == 1 else f"{world_size:,} ranks"


def _too_large(planned: Planned, model: _Model) -> str:
    """Bytes per table, and for each setting a change that fits."""
    request = planned.request
    ranks = request.ranks
    report = sorted(memory_report(request.tables), key=lambda record: -record.num_bytes)
    kind = "HBM" if request.costs.device == "cuda" else "DDR"
    each = ranks.hbm if kind == "HBM" else ranks.ddr
    head = (
        f"the tables do not fit {_ranks_of(ranks.world_size)} of {size(each)} {kind}"
        + (f" and {size(ranks.ddr)} DDR" if kind == "HBM" else "")
        + f", {ranks.reserved:.0%} of them and {size(planned.workspace)} of workspace kept free"
    )
    lines = [
        *wrapped(f"{_PREFIX}{head}"),
        f"{'table':<24}{'method':<14}{'bytes':>22}{'dense bytes':>22}",
    ]
    methods = {table.name: method_of(table) for table in request.tables}
    for record in report[:_FITTED]:
        lines.append(
            f"{record.table[:23]:<24}{methods[record.table]:<14}{record.num_bytes:>22,}{record.dense_bytes:>22,}"
        )
    if len(report) > _FITTED:
        rest = report[_FITTED:]
        lines.append(
            f"{f'... {len(rest)} smaller tables':<38}{sum(r.num_bytes for r in rest):>22,}"
            f"{sum(r.dense_bytes for r in rest):>22,}"
        )
    known = fitting_changes(request, model.method, model.compress_rate, model.method_threshold)
    lines.append("a change that fits, one of:" if known else "no single change makes it fit")
    lines += [f"  {change}" for change in known]
    if model.method == "dense":
        lines.append("  or a compression: --method tt, qr, robe or md with --compress_rate")
    return "\n".join(lines).removeprefix(_PREFIX)
