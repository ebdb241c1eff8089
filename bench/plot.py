"""Horizontal bars: each case's step time as a multiple of fbgemm's TBE."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.results import Row
from bench.settings import is_ours
from recemb.training.plots import figure_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# More bars cannot be told apart on one page; the grid is for the CSV.
MOST_BARS = 120
# Okabe and Ito's colours, told apart by colour-blind readers.
_COLOURS = {"op": "#0072B2", "module": "#56B4E9", "forward": "#009E73", "peer": "#999999", "bound": "#D55E00"}
_BAR_INCHES, _PANEL_INCHES = 0.21, 0.55


def save_plot(rows: Sequence[Row], folder: Path, name: str) -> list[Path]:
    """Write ``name``.png and ``name``.svg; nothing when no row has a ratio to TBE, or too many have one."""
    drawn = [row for row in rows if row.ratio_tbe is not None]
    if not drawn or len(drawn) > MOST_BARS:
        return []
    figure = ratio_figure(drawn)
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    figure.savefig(png, dpi=130)
    svg.write_text(figure_svg(figure), encoding="utf-8")
    return [png, svg]


def ratio_figure(rows: Sequence[Row]) -> Figure:
    """One panel a setting, all on the same log axis, TBE's 1.0 as a line and the targets as ticks."""
    from matplotlib.figure import Figure

    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(row.setting, []).append(row)
    heights = [_BAR_INCHES * len(panel) + _PANEL_INCHES for panel in panels.values()]
    figure = Figure(figsize=(9, sum(heights) + 0.9), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)
    for axes, (title, panel) in zip(grid[:, 0], panels.items(), strict=True):
        _draw(axes, title, panel)
    bottom = grid[-1, 0]
    bottom.set_xscale("log")
    _label_ratios(bottom)
    bottom.set_xlabel("step time as a multiple of fbgemm TBE's (log scale; left of 1 is faster)")
    figure.legend(handles=_legend(), loc="outside upper center", ncols=6, fontsize=8, frameon=False)
    return figure


def _draw(axes: Axes, title: str, rows: Sequence[Row]) -> None:
    places = range(len(rows) - 1, -1, -1)
    ratios = [row.ratio_tbe or 0.0 for row in rows]
    # A log axis has no zero to start from: bars run from TBE's line.
    axes.barh(
        list(places), [r - 1 for r in ratios], left=1, height=0.72, color=[_colour(row) for row in rows]
    )
    for place, row, value in zip(places, rows, ratios, strict=True):
        axes.annotate(
            f"{value:.2g}",
            (value, place),
            xytext=(3 if value >= 1 else -3, 0),
            textcoords="offset points",
            ha="left" if value >= 1 else "right",
            va="center",
            fontsize=7,
        )
        # A bound on another ratio than the one drawn has no place on this axis.
        if row.target.startswith("<="):
            axes.plot(
                [float(row.target[2:])] * 2, [place - 0.45, place + 0.45], color=_COLOURS["bound"], lw=2
            )
    axes.axvline(1, color="#000000", lw=1)
    axes.set_yticks(list(places), [f"{row.case} · {row.path}" for row in rows], fontsize=7)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_title(title, fontsize=8, loc="left", pad=3)
    axes.grid(True, axis="x", which="major", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def _colour(row: Row) -> str:
    return _COLOURS[row.path if is_ours(row.case) and not row.case.startswith("TBE ") else "peer"]


def _label_ratios(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    # Room for the numbers beside the outermost bars.
    axes.set_xlim(low / 1.3, high * 1.3)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 1000 * low else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend() -> list[object]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = {
        "op": "ours, ready ids",
        "module": "ours, whole module",
        "forward": "ours, forward only",
        "peer": "peers",
    }
    bars: list[object] = [Patch(color=_COLOURS[key], label=name) for key, name in names.items()]
    tbe = Line2D([], [], color="#000000", lw=1, label="fbgemm TBE")
    return [*bars, tbe, Line2D([], [], color=_COLOURS["bound"], lw=2, label="target")]
