"""Horizontal bars: each case's step time as a multiple of fbgemm's TBE."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from bench.results import Row
from bench.settings import OP, TBE, is_ours
from recemb.training.plots import figure_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# More bars cannot be told apart on one page, and nobody leafs through more pages: the grid is for the CSV.
_MOST_BARS, MOST_PAGES = 120, 6
# Okabe and Ito's colours, told apart by colour-blind readers.
_COLOURS = {"op": "#0072B2", "module": "#56B4E9", "forward": "#009E73", "peer": "#999999", "bound": "#D55E00"}
_BAR_INCHES, _PANEL_INCHES = 0.21, 0.62
_COLUMN_INCHES, _TALL_INCHES = 7.5, 9.0


def save_plot(rows: Sequence[Row], folder: Path, name: str) -> list[Path]:
    """Write ``name``.png and ``name``.svg, and ``name``_2 and on where one page does not hold all settings.

    Returns:
        The files; none when no row has a ratio to TBE, or too many have one.
    """
    pages = _pages(rows)
    names = [name, *(f"{name}_{number}" for number in range(2, MOST_PAGES + 1))]
    files = []
    for stem, page in zip_longest(names, pages if len(pages) <= MOST_PAGES else []):
        png, svg = folder / f"{stem}.png", folder / f"{stem}.svg"
        if page is None:
            # Pages of a run that had more settings do not stay beside the CSV of this one.
            png.unlink(missing_ok=True)
            svg.unlink(missing_ok=True)
            continue
        figure = ratio_figure(page)
        figure.savefig(png, dpi=130)
        svg.write_text(figure_svg(figure), encoding="utf-8")
        files += [png, svg]
    return files


def _panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The bars of each setting."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        # TBE against itself is the line.
        if row.ratio_tbe is not None and (row.case, row.path) != (TBE, OP):
            panels.setdefault(row.setting, []).append(row)
    return panels


def _pages(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows by whole settings, as many as a page holds."""
    pages: list[list[Row]] = []
    for panel in _panels(rows).values():
        if not pages or len(pages[-1]) + len(panel) > _MOST_BARS:
            pages.append([])
        pages[-1] += panel
    return pages


def ratio_figure(rows: Sequence[Row]) -> Figure:
    """One panel a setting, all on the same log axis, TBE's 1.0 as a line and the targets as ticks."""
    from matplotlib.figure import Figure

    columns = _columns(_panels(rows))
    height = max(sum(map(_height, column.values())) for column in columns)
    figure = Figure(figsize=(_COLUMN_INCHES * len(columns), height + 1.0), layout="constrained")
    limits = _limits(rows)
    parts = figure.subfigures(1, len(columns), squeeze=False)[0]
    for part, column in zip(parts, columns, strict=True):
        # The last, invisible row keeps bars equally tall in columns of unequal length.
        heights = [_height(panel) for panel in column.values()]
        spare = height - sum(heights)
        ratios = [*heights, spare] if spare > _BAR_INCHES else heights
        grid = part.subplots(len(ratios), 1, squeeze=False, height_ratios=ratios)[:, 0]
        for axes, (title, panel) in zip(grid, column.items(), strict=False):
            _draw(axes, title, panel, limits)
        for axes in grid[len(column) :]:
            axes.set_axis_off()
    figure.suptitle("step time as a multiple of fbgemm TBE's (log scale; left of 1 is faster)", fontsize=10)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    return figure


def _height(panel: Sequence[Row]) -> float:
    return _BAR_INCHES * len(panel) + _PANEL_INCHES


def _columns(panels: dict[str, list[Row]]) -> list[dict[str, list[Row]]]:
    """One column, or two of about the same height when one would be a tall tower."""
    total = sum(map(_height, panels.values()))
    if total < _TALL_INCHES:
        return [panels]
    first: dict[str, list[Row]] = {}
    rest = dict(panels)
    for title in panels:
        if first and sum(map(_height, first.values())) + _height(rest[title]) / 2 > total / 2:
            break
        first[title] = rest.pop(title)
    return [first, rest] if rest else [first]


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    """The range of all ratios and targets, with room for the numbers beside the bars."""
    values = [row.ratio_tbe for row in rows if row.ratio_tbe is not None]
    values += [bound for row in rows if (bound := _bound(row)) is not None]
    return min(values) / 2, max(values) * 2


def _bound(row: Row) -> float | None:
    """The target, when it is one on the ratio that is drawn."""
    return float(row.target[2:]) if row.target.startswith("<=") else None


def _draw(axes: Axes, title: str, rows: Sequence[Row], limits: tuple[float, float]) -> None:
    places = range(len(rows) - 1, -1, -1)
    for place, row in zip(places, rows, strict=True):
        value, bound = row.ratio_tbe or limits[0], _bound(row)
        # A log axis has no zero to start from: bars run from TBE's line.
        axes.barh(place, value - 1, left=1, height=0.72, color=_colour(row))
        ends = [value] if bound is None else [value, bound]
        axes.annotate(
            f"{value:.0f}" if value >= 100 else f"{value:.2g}",
            (max(ends) if value >= 1 else min(ends), place),
            xytext=(3 if value >= 1 else -3, 0),
            textcoords="offset points",
            ha="left" if value >= 1 else "right",
            va="center",
            fontsize=7,
        )
        if bound is not None:
            axes.plot([bound] * 2, [place - 0.45, place + 0.45], color=_COLOURS["bound"], lw=2)
    axes.axvline(1, color="#000000", lw=1)
    axes.set_yticks(list(places), [f"{row.case} · {row.path}" for row in rows], fontsize=7)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_title(title, fontsize=8, loc="left", pad=3)
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    axes.tick_params(axis="x", labelsize=7)
    _label_ratios(axes)
    axes.grid(True, axis="x", which="major", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def _colour(row: Row) -> str:
    return _COLOURS[row.path if is_ours(row.case) and not row.case.startswith("TBE ") else "peer"]


def _label_ratios(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
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
