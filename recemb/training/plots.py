"""Two pictures of a comparison: AUC against embedding bytes, and validation AUC over training steps.

Needs matplotlib, the extra ``recemb[plots]``.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from recemb.training.report import Setting
from recemb.units import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import FillStyleType

MISSING_MATPLOTLIB = "no plot: matplotlib is missing; install it with: pip install 'recemb[plots]'"

# Okabe and Ito's colours, told apart by colour-blind readers, without the yellow, which white paper swallows.
_COLOURS = ("#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#D55E00", "#0072B2", "#666666")
# A marker for each method, for print, and the colour of its first setting.
_METHODS = {
    "dense": ("o", "#000000"),
    "tt": ("s", "#0072B2"),
    "robe": ("^", "#D55E00"),
    "qr": ("D", "#009E73"),
    "md": ("v", "#CC79A7"),
}
_OTHER_MARKER = "P"
_Line = Literal["-", "--", ":", "-."]
# The line, and which part of the marker is filled, once all colours are taken.
_ROUNDS: tuple[tuple[_Line, FillStyleType], ...] = (
    ("-", "full"),
    ("--", "none"),
    (":", "left"),
    ("-.", "bottom"),
)


@dataclass(frozen=True)
class Style:
    """How one setting looks, in every picture."""

    colour: str
    marker: str
    line: _Line
    fill: FillStyleType


def styles_of(settings: Sequence[Setting]) -> list[Style]:
    """One style each, no two of the first 28 alike; the first setting of a method has the method's colour."""
    own = {method: (colour, *_ROUNDS[0]) for method, (_, colour) in _METHODS.items()}
    kept = [own[setting.method] for setting in settings if setting.method in own]
    looks = [(colour, *look) for look in _ROUNDS for colour in _COLOURS]
    others = cycle([look for look in looks if look not in kept])
    styles = []
    for setting in settings:
        colour, line, fill = own.pop(setting.method) if setting.method in own else next(others)
        marker = _METHODS[setting.method][0] if setting.method in _METHODS else _OTHER_MARKER
        styles.append(Style(colour, marker, line, fill))
    return styles


def have_matplotlib() -> bool:
    """Whether plots can be drawn here."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def comparison_figure(settings: Sequence[Setting]) -> Figure:
    """Draw both pictures side by side."""
    # The Figure class itself, not pyplot: no display, no global state.
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    styled = list(zip(settings, styles_of(settings), strict=True))
    columns = 2 if len(styled) > 4 else max(1, len(styled))
    rows = math.ceil(len(styled) / columns)
    # The key is below both pictures: it grows with the settings and covers no point.
    figure = Figure(figsize=(12, 4.8 + 0.22 * rows), layout="constrained")
    size_axes, curve_axes = figure.subplots(1, 2)
    _draw_sizes(size_axes, styled)
    _draw_curves(curve_axes, styled)
    keys = [
        Line2D(
            [],
            [],
            color=style.colour,
            marker=style.marker,
            fillstyle=style.fill,
            linestyle=style.line,
            label=f"{setting.name} ({size(setting.embedding_bytes)})",
        )
        for setting, style in styled
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    return figure


def save_figure(figure: Figure, folder: Path) -> list[Path]:
    """Write ``comparison.png`` and ``comparison.svg`` into ``folder``."""
    png, svg = folder / "comparison.png", folder / "comparison.svg"
    figure.savefig(png, dpi=150)
    svg.write_text(figure_svg(figure), encoding="utf-8")
    return [png, svg]


def figure_svg(figure: Figure) -> str:
    """The figure as one ``<svg>`` element that refers to nothing outside itself, equal for equal data."""
    from matplotlib import rc_context

    stream = io.StringIO()
    with rc_context({"svg.hashsalt": "recemb", "svg.fonttype": "none"}):
        figure.savefig(
            stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = stream.getvalue()
    # The XML prologue names a DTD on another host, and the metadata block vocabularies on several.
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def _draw_sizes(axes: Axes, styled: Sequence[tuple[Setting, Style]]) -> None:
    for setting, style in styled:
        if setting.auc is None:
            continue
        axes.errorbar(
            setting.embedding_bytes,
            setting.auc.mean,
            yerr=setting.auc.std,
            color=style.colour,
            marker=style.marker,
            fillstyle=style.fill,
            markersize=8,
            capsize=4,
            linestyle="none",
        )
    best = [
        run.result["best_auc"] for setting, _ in styled for run in setting.runs if run.result.get("best_auc")
    ]
    if best:
        axes.axhline(max(best), color="#888888", linestyle="--", linewidth=1, label="best possible")
    axes.set_xscale("log")
    _label_bytes(axes)
    axes.set_xlabel("embedding bytes (log scale)")
    axes.set_ylabel("AUC")
    axes.set_title("Accuracy against table size")
    if best:
        axes.legend(loc="best", fontsize=9, framealpha=0.9)
    _finish(axes)


def _draw_curves(axes: Axes, styled: Sequence[tuple[Setting, Style]]) -> None:
    for setting, style in styled:
        for run in setting.runs:
            points = [
                (r["step"], r["auc"]) for r in run.curve if r["split"] == "val" and r["auc"] is not None
            ]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=style.colour,
                    marker=style.marker,
                    fillstyle=style.fill,
                    linestyle=style.line,
                    markersize=4,
                    linewidth=1.2 if len(setting.runs) == 1 else 0.7,
                )
    axes.set_xlabel("training step")
    axes.set_ylabel("validation AUC")
    axes.set_title("Validation AUC while training")
    _finish(axes)


def _label_bytes(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    decades = high / low
    # A range of less than two decades has too few round powers of ten to be read.
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 100 else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _finish(axes: Axes) -> None:
    axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
