"""Two pictures of a comparison: AUC against embedding bytes, and validation AUC over training steps.

Needs matplotlib, the extra ``recemb[plots]``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recemb.training.report import Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING_MATPLOTLIB = "no plot: matplotlib is missing; install it with: pip install 'recemb[plots]'"

# Okabe and Ito's colours, told apart by colour-blind readers, with a marker each for print.
_STYLES = {
    "dense": ("#000000", "o"),
    "tt": ("#0072B2", "s"),
    "robe": ("#D55E00", "^"),
    "qr": ("#009E73", "D"),
    "md": ("#CC79A7", "v"),
}
_OTHER_STYLE = ("#666666", "P")


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

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    size_axes, curve_axes = figure.subplots(1, 2)
    _draw_sizes(size_axes, settings)
    _draw_curves(curve_axes, settings)
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


def _draw_sizes(axes: Axes, settings: Sequence[Setting]) -> None:
    known = [setting for setting in settings if setting.auc is not None]
    for setting in known:
        assert setting.auc is not None
        colour, marker = _STYLES.get(setting.method, _OTHER_STYLE)
        axes.errorbar(
            setting.embedding_bytes,
            setting.auc.mean,
            yerr=setting.auc.std,
            color=colour,
            marker=marker,
            markersize=8,
            capsize=4,
            linestyle="none",
            label=_label(setting),
        )
    best = [
        run.result["best_auc"] for setting in settings for run in setting.runs if run.result.get("best_auc")
    ]
    if best:
        axes.axhline(max(best), color="#888888", linestyle="--", linewidth=1, label="best possible")
    axes.set_xscale("log")
    _label_bytes(axes)
    axes.set_xlabel("embedding bytes (log scale)")
    axes.set_ylabel("AUC")
    axes.set_title("Accuracy against table size")
    _finish(axes)


def _draw_curves(axes: Axes, settings: Sequence[Setting]) -> None:
    for setting in settings:
        colour, marker = _STYLES.get(setting.method, _OTHER_STYLE)
        for index, run in enumerate(setting.runs):
            points = [
                (r["step"], r["auc"]) for r in run.curve if r["split"] == "val" and r["auc"] is not None
            ]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    marker=marker,
                    markersize=4,
                    linewidth=1.2,
                    alpha=0.9 if len(setting.runs) == 1 else 0.5,
                    label=_label(setting) if index == 0 else None,
                )
    axes.set_xlabel("training step")
    axes.set_ylabel("validation AUC")
    axes.set_title("Validation AUC while training")
    _finish(axes)


def _label(setting: Setting) -> str:
    return f"{setting.name} ({format_bytes(setting.embedding_bytes)})"


def _label_bytes(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    decades = high / low
    # A range of less than two decades has too few round powers of ten to be read.
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 100 else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _finish(axes: Axes) -> None:
    axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    handles: list[Any] = axes.get_legend_handles_labels()[0]
    if handles:
        axes.legend(loc="best", fontsize=9, framealpha=0.9)


def format_bytes(value: float) -> str:
    """``1.5 MB``: decimal units, two or three significant digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
