"""One HTML file with everything about a comparison: table, pictures, bytes per table, configurations.

It loads nothing: style and pictures are inline, there is no script.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from recemb.errors import ConfigError
from recemb.files import write_text
from recemb.training.plots import (
    MISSING_MATPLOTLIB,
    comparison_figure,
    figure_svg,
    have_matplotlib,
    save_figure,
)
from recemb.training.report import Run, Setting, Spread, footnotes, summarise
from recemb.units import size

_STYLE = """\
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .25em .8em; text-align: right }
th { border-bottom: 2px solid #444 } td { border-bottom: 1px solid #ddd }
th.text, td.text { text-align: left } pre { background: #f5f5f5; padding: 1em; overflow: auto }
figure { margin: 1em 0 } svg { max-width: 100%; height: auto } summary { cursor: pointer; font-weight: 600 }
.note { color: #555 }
"""


def write_report(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write ``report.html`` and, with matplotlib, ``comparison.png`` and ``comparison.svg`` into ``folder``.

    Returns:
        the files written. Without matplotlib stderr says how to get it.

    Raises:
        ConfigError: the folder cannot be written.
    """
    settings, svg = summarise(runs), None
    files = [folder / "report.html"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if have_matplotlib():
            figure = comparison_figure(settings)
            files += save_figure(figure, folder)
            svg = figure_svg(figure)
        else:
            print(MISSING_MATPLOTLIB, file=sys.stderr)
        write_text(files[0], html_report(settings, runs, svg, MISSING_MATPLOTLIB))
    except OSError as error:
        raise ConfigError(
            f"--output {folder}: cannot write: {error.strerror or error}; give another --output"
        ) from error
    return files


def html_report(settings: Sequence[Setting], runs: Sequence[Run], svg: str | None, missing: str = "") -> str:
    """The whole report.

    Args:
        settings: the comparison, from :func:`recemb.training.report.summarise`.
        runs: the runs behind it.
        svg: the pictures as one ``<svg>`` element, or ``None``.
        missing: shown in their place.
    """
    picture = f"<figure>{svg}</figure>" if svg is not None else f'<p class="note">{escape(missing)}</p>'
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in footnotes(runs, settings))
    details = "".join(_details(setting) for setting in settings)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>recemb report</title>'
        f"<style>{_STYLE}</style></head><body><h1>Comparison of {len(runs)} runs</h1>"
        f"{_comparison(settings)}{notes}{picture}<h2>Runs</h2>{details}</body></html>\n"
    )


def _comparison(settings: Sequence[Setting]) -> str:
    header = ("run", "method", "embedding bytes", "ratio", "AUC", "ΔAUC", "logloss", "samples/s", "ms/step")
    rows = [
        (
            setting.name,
            setting.method,
            size(setting.embedding_bytes),
            f"{setting.ratio:,.1f}×",
            _spread(setting.auc, 5),
            _spread(setting.auc_loss, 5, "+"),
            _spread(setting.logloss, 5),
            _spread(setting.samples_per_second, 0),
            _spread(setting.step_ms, 2),
        )
        for setting in settings
    ]
    return _table(header, rows, text_columns=2)


def _details(setting: Setting) -> str:
    run = setting.runs[0]
    tables = run.result.get("tables", [])
    rows = [
        (
            str(table["table"]),
            str(table["method"]),
            f"{table['num_embeddings']:,}",
            str(table["embedding_dim"]),
            f"{table['num_bytes']:,}",
            f"{table['dense_bytes']:,}",
            f"{table['ratio']:,.1f}×",
        )
        for table in tables
    ]
    memory = _table(("table", "method", "rows", "dim", "bytes", "dense bytes", "ratio"), rows, text_columns=2)
    config = "\n".join(f"{key}: {value}" for key, value in run.config.model_dump(mode="json").items())
    versions = ", ".join(f"{name} {value}" for name, value in run.result.get("versions", {}).items())
    paths = ", ".join(str(each.path) for each in setting.runs)
    return (
        f"<details><summary>{escape(setting.name)}</summary><p>{escape(paths)}</p>"
        f"<p>{escape(versions)}</p>{memory}<pre>{escape(config)}</pre></details>"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=text' if column < text_columns else ''}>{escape(cell)}</{tag}>"
            for column, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', header)}</tr></thead><tbody>{body}</tbody></table>"


def _spread(spread: Spread | None, digits: int, sign: str = "") -> str:
    return "-" if spread is None else spread.text(digits, sign)
