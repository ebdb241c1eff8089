"""``recemb plan --statistics``: which rows go to HBM, to DDR, and to compressed parameters."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recemb.cli.plan_run import costs_of
from recemb.data.layout import read_json, write_json
from recemb.errors import ConfigError, DataError
from recemb.planner.budget import BudgetedTables, compress
from recemb.planner.costs import Costs
from recemb.planner.frequencies import row_frequencies
from recemb.planner.report import milliseconds, wrapped
from recemb.planner.statistical import place_rows as place_tiers
from recemb.planner.statistical import unreserved
from recemb.planner.tiers import Corners, TieredTable, TierPlan, Tiers, stored_bytes
from recemb.planner.work import forward_work
from recemb.spec import DTYPE_BYTES, Dense, TableSpec
from recemb.torchrec_io.planning.planned import OPTIMIZERS
from recemb.units import size


def place_rows(args: argparse.Namespace) -> str:
    """Place every row of a prepared log's tables, write the placement, and return what is printed.

    Raises:
        DataError: statistics that cannot be used.
        PlanError: the compressed tables alone do not fit.
    """
    if args.device == "cpu":
        raise ConfigError(
            "--statistics places rows over HBM and DDR, and a CPU has no HBM; use --device cuda"
        )
    stats = read_json(Path(args.statistics))
    features = stats.get("features") if isinstance(stats, dict) else None
    if not isinstance(features, list) or not features:
        raise DataError(f"{args.statistics} is not a stats.json of recemb prepare: it has no features")
    method, rate = args.method or "tt", args.compress_rate or 100.0
    if method == "dense":
        raise ConfigError(
            "--statistics places rows over a compressed table; choose --method tt, qr, robe or md"
        )
    costs = costs_of(args, "cuda")
    ranks = args.world_size
    hbm, ddr = args.hbm, args.ddr
    if hbm is None or ddr is None:
        raise ConfigError("--statistics needs both budgets of a rank: --hbm SIZE and --ddr SIZE")
    tables = _tables(features, args.embedding_dim or 16)
    threshold = 200 if args.method_threshold is None else args.method_threshold
    budget = compress(tables, method, rate, threshold)
    batch = (args.batch_size or 512) * ranks
    optimizer = args.optimizer or "rowwise_adagrad"
    stored = stored_bytes(budget.tables, OPTIMIZERS[optimizer].__name__)
    tiered = _tiered(features, budget.tables, stats, _Step(batch, costs, stored))
    plan = _uncompressed_is_hot(place_tiers(tiered, hbm, ddr, ranks, args.reserved), budget.tables)
    budgets = _Budgets(hbm, ddr, ranks, args.reserved)
    document = _document(plan, budget, budgets, optimizer)
    if args.output:
        write_json(Path(args.output), document)
    if args.format == "json":
        return json.dumps(document, indent=1)
    return "\n".join(_text(plan, budget, f"{method} at {rate:g}x", budgets, optimizer))


@dataclass(frozen=True)
class _Step:
    """A training step: samples of all ranks, constants, and :func:`stored_bytes` of the tables."""

    batch: int
    costs: Costs
    stored: Sequence[tuple[int, int, Corners]]


@dataclass(frozen=True)
class _Budgets:
    """Bytes of HBM and DDR of a rank, and the part of them that is kept free."""

    rank_hbm: int
    rank_ddr: int
    ranks: int
    reserved: float

    @property
    def hbm(self) -> int:
        """What tables may take on all ranks."""
        return unreserved(self.rank_hbm, self.reserved) * self.ranks

    @property
    def ddr(self) -> int:
        """What tables may take on all ranks."""
        return unreserved(self.rank_ddr, self.reserved) * self.ranks


def _tables(features: Sequence[Any], dim: int) -> list[TableSpec]:
    tables = []
    for feature in features:
        try:
            name, rows = str(feature["name"]), int(feature["num_embeddings"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the statistics have a feature without name and rows ({error!r})") from None
        tables.append(
            TableSpec(name=f"t_{name}", num_embeddings=rows, embedding_dim=dim, feature_names=(name,))
        )
    return tables


def _tiered(
    features: Sequence[Any],
    tables: Sequence[TableSpec],
    stats: Any,
    step: _Step,
) -> list[TieredTable]:
    """Each table with the times of its tiers; of a table left uncompressed, "compressed" is itself."""
    batch, costs = step.batch, step.costs
    near, far = costs["hbm_bandwidth"], costs["hbm_to_ddr_bandwidth"]
    rows_of = stats.get("rows", {})
    train_rows = int(rows_of.get("train", 0)) if isinstance(rows_of, dict) else 0
    made = []
    for feature, table, (row_bytes, compressed, cached) in zip(features, tables, step.stored, strict=True):
        # A look-up reads the weights alone.
        read = table.embedding_dim * DTYPE_BYTES[table.dtype]
        hot = read / near * 1e9
        warm = read / far * 1e9
        cold = hot
        if not isinstance(table.compression, Dense):
            work = forward_work(table, float(batch), float(batch), costs["id_skew"])
            cold = costs.forward_ms(table.compression.method, work) * 1e6 / batch
        made.append(
            TieredTable(
                table.name,
                row_frequencies(feature, float(batch), train_rows),
                row_bytes,
                compressed,
                hot,
                warm,
                cold,
                cached,
            )
        )
    return made


def _uncompressed_is_hot(plan: TierPlan, tables: Sequence[TableSpec]) -> TierPlan:
    """The same with the rows of tables that are not compressed counted as hot, where they are in HBM."""
    tiers = [
        Tiers(t.table, t.hot + t.cold, t.warm) if isinstance(table.compression, Dense) else t
        for t, table in zip(plan.tiers, tables, strict=True)
    ]
    return TierPlan(tuple(tiers), plan.bound_ns)


def _shares(tiers: Tiers) -> tuple[float, float, float]:
    """Parts of the look-ups that fall on hot, warm and cold rows."""
    table = tiers.table
    ends, taken = (tiers.hot, tiers.hot + tiers.warm, table.num_rows), [0.0, 0.0, 0.0]
    start = 0
    for rows in table.rows:
        end = start + rows.count
        before = start
        for tier, stop in enumerate(ends):
            inside = max(0, min(end, stop) - before)
            taken[tier] += inside * rows.lookups
            before += inside
        start = end
    total = sum(taken) or 1.0
    return taken[0] / total, taken[1] / total, taken[2] / total


def _runs_today(tiers: Tiers, table: TableSpec) -> str:
    """What of a table's placement recemb can run."""
    if not tiers.cold:
        return "Dense(), warm rows: advice" if tiers.warm else "Dense()"
    text = f"HotRows(rows={tiers.hot})" if tiers.hot else "compressed"
    return text + (", warm: advice" if tiers.warm else "")


def _text(
    plan: TierPlan, budget: BudgetedTables, method: str, budgets: _Budgets, optimizer: str
) -> list[str]:
    tables = budget.tables
    hbm, ddr = sum(t.hbm for t in plan.tiers), sum(t.ddr for t in plan.tiers)
    lines = [
        f"rows of {len(tables)} tables over HBM, DDR and {method}, {budgets.ranks} "
        f"rank{'s' if budgets.ranks > 1 else ''} of {size(budgets.rank_hbm)} and {size(budgets.rank_ddr)}",
        f"{budgets.reserved:.0%} of them kept free; optimizer {optimizer}, whose state is counted",
        f"{'table':<12} {'hot rows':>10} {'warm rows':>10} {'cold rows':>11} "
        f"{'look-ups hot/warm/cold':>22}  runs today as",
    ]
    for tiers, table in zip(plan.tiers, tables, strict=True):
        hot, warm, cold = _shares(tiers)
        lines.append(
            f"{table.name[:12]:<12} {tiers.hot:>10,} {tiers.warm:>10,} {tiers.cold:>11,} "
            f"{f'{hot:.1%} / {warm:.1%} / {cold:.1%}':>22}  {_runs_today(tiers, table)}"[:100]
        )
    lines += [
        f"HBM {size(hbm)} of {size(budgets.hbm)}, DDR {size(ddr)} of {size(budgets.ddr)}",
        f"expected access time of a step {milliseconds(plan.ns / 1e6)} ms; no placement is faster than "
        f"{milliseconds(plan.bound_ns / 1e6)} ms: within {plan.gap:.2%}",
        "HotRows keeps rows by what training looks up; recemb has no rows in DDR:",
        "for those the placement is advice (torchrec's fused_uvm_caching keeps whole tables there).",
    ]
    if budget.shortfall:
        lines += wrapped(f"note: {budget.shortfall}")
    return lines


def _document(plan: TierPlan, budget: BudgetedTables, budgets: _Budgets, optimizer: str) -> dict[str, Any]:
    return {
        "format": "recemb-rows",
        "version": 1,
        "optimizer": optimizer,
        "reserved": budgets.reserved,
        "hbm_bytes": budgets.hbm,
        "ddr_bytes": budgets.ddr,
        "ns": plan.ns,
        "lower_bound_ns": plan.bound_ns,
        "gap": plan.gap,
        "shortfall": budget.shortfall,
        "tables": [
            {
                "table": table.name,
                "compression": str(table.compression),
                "hot_rows": tiers.hot,
                "warm_rows": tiers.warm,
                "cold_rows": tiers.cold,
                "hbm_bytes": tiers.hbm,
                "ddr_bytes": tiers.ddr,
                "lookup_shares": _shares(tiers),
                "runs_today": _runs_today(tiers, table),
            }
            for tiers, table in zip(plan.tiers, budget.tables, strict=True)
        ],
    }
