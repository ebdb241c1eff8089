"""Three pictures of a cache: hit rate and step time against its size, AUC against bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.cache_auc import AucRow
from bench.cache_steps import StepRow
from recemb.training.plots import figure_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by colour-blind readers, with a marker each for print.
_STYLES = {"lfu": ("#0072B2", "s"), "lru": ("#009E73", "D"), "importance": ("#D55E00", "^")}
_PLAIN = ("#000000", "o")
_LINES = {"zipf": "-", "permuted": "--"}


def save_cache_plot(steps: Sequence[StepRow], accuracies: Sequence[AucRow], folder: Path) -> list[Path]:
    """Write ``cache.png`` and ``cache.svg``."""
    from matplotlib.figure import Figure

    panels = 3 if accuracies else 2
    figure = Figure(figsize=(4.6 * panels, 4.0), layout="constrained")
    axes = figure.subplots(1, panels)
    _draw_hits(axes[0], steps)
    _draw_times(axes[1], steps)
    if accuracies:
        _draw_auc(axes[2], accuracies)
    png, svg = folder / "cache.png", folder / "cache.svg"
    figure.savefig(png, dpi=130)
    svg.write_text(figure_svg(figure), encoding="utf-8")
    return [png, svg]


def _cached(steps: Sequence[StepRow]) -> dict[tuple[str, str], list[StepRow]]:
    """By ids and policy, smallest first."""
    series: dict[tuple[str, str], list[StepRow]] = {}
    for row in sorted(steps, key=lambda row: row.fraction):
        if row.policy:
            series.setdefault((row.ids, row.policy), []).append(row)
    return dict(sorted(series.items(), key=lambda item: [*_LINES].index(item[0][0])))


def _draw_hits(axes: Axes, steps: Sequence[StepRow]) -> None:
    for (ids, policy), rows in _cached(steps).items():
        colour, marker = _STYLES[policy]
        sizes = [100 * row.fraction for row in rows]
        label = policy if ids == "zipf" else f"{policy}, {ids} ids"
        hits = [100 * row.hit_rate for row in rows]
        axes.plot(sizes, hits, marker, ls=_LINES[ids], color=colour, label=label)
        axes.plot(sizes, [100 * row.ideal_hit_rate for row in rows], ":", color="#666666")
    axes.set_title("hit rate, %  (dotted: the C most frequent ids)", fontsize=9, loc="left")
    _finish(axes, "rows cached, %", [100 * row.fraction for row in steps if row.policy])


def _draw_times(axes: Axes, steps: Sequence[StepRow]) -> None:
    first = steps[0].ids
    for (ids, policy), rows in _cached(steps).items():
        if ids != first:
            continue
        colour, marker = _STYLES[policy]
        sizes = [100 * row.fraction for row in rows]
        axes.plot(sizes, [row.ratio for row in rows], marker, ls="-", color=colour, label=policy)
        means = [row.mean_ratio for row in rows]
        axes.plot(sizes, means, marker, ls="--", color=colour, fillstyle="none")
    axes.axhline(1, color="#000000", lw=1)
    axes.set_title("step time, × without a cache  (dashed: with exchanges)", fontsize=9, loc="left")
    axes.set_ylim(bottom=0)
    _finish(axes, "rows cached, %", [100 * row.fraction for row in steps if row.policy])


def _draw_auc(axes: Axes, rows: Sequence[AucRow]) -> None:
    plain = sorted((r for r in rows if not r.policy), key=lambda r: r.embedding_bytes)
    series = {"no cache": plain} | {p: [r for r in rows if r.policy == p] for p in _STYLES}
    for name, own in series.items():
        if not own:
            continue
        colour, marker = _STYLES.get(name, _PLAIN)
        own = sorted(own, key=lambda r: r.embedding_bytes)
        axes.errorbar(
            [r.embedding_bytes / 1e3 for r in own],
            [r.auc for r in own],
            [r.auc_std for r in own],
            marker=marker,
            color=colour,
            label=name,
            capsize=3,
        )
    axes.set_title("AUC against bytes of all tables", fontsize=9, loc="left")
    _finish(axes, "kB", [r.embedding_bytes / 1e3 for r in plain])


def _finish(axes: Axes, label: str, sizes: Sequence[float]) -> None:
    axes.set_xscale("log")
    # What was measured, in plain numbers; powers of ten say little of sizes so close.
    ticks = sorted({float(f"{size:.2g}") for size in sizes})
    axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(True, color="#dddddd", linewidth=0.8)
    axes.legend(fontsize=8, frameon=False)
