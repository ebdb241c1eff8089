"""Aggregation over seeds, the paired loss, the table's width, the HTML file."""

from __future__ import annotations

import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from recemb.errors import ConfigError, DataError
from recemb.planner.budget import compress
from recemb.spec import TableSpec
from recemb.training import html_report as html_module
from recemb.training.config import parse_config
from recemb.training.html_report import write_report
from recemb.training.report import TABLE_WIDTH, comparison_table, load_runs, summarise

DENSE = {0: 0.760, 1: 0.770, 2: 0.765}
LOSS = {0: 0.004, 1: 0.006, 2: 0.002}


def write_run(
    path: Path, method: str = "dense", seed: int = 0, auc: float | None = 0.75, **more: Any
) -> Path:
    """A run directory as ``recemb train`` leaves it."""
    rate = None if method == "dense" else more.pop("compress_rate", 100)
    settings = {
        "data_dir": "data",
        "output": str(path),
        "method": method,
        "compress_rate": rate,
        "seed": seed,
    }
    config = parse_config(settings | more.pop("config", {}))
    result = {
        "auc": auc,
        "logloss": 0.45,
        "ne": 0.8,
        "calibration": 1.0,
        "embedding_bytes": 10**8 // (rate or 1),
        "dense_embedding_bytes": 10**8,
        "compression_ratio": float(rate or 1),
        "samples_per_second": 12345.6,
        "step_ms_p50": 12.3,
        "peak_rss_bytes": 10**9,
        "seed": seed,
        "versions": {"torch": "2.13.0"},
        "status": "completed",
        "steps": 20,
        "method": method,
        "split": "val",
        "shortfall": None,
        "best_auc": None,
        "tables": [
            {"table": "t_cat_0", "method": method, "num_embeddings": 1000, "embedding_dim": 16,
             "num_bytes": 640, "dense_bytes": 64000, "ratio": 100.0}
        ],
    }  # fmt: skip
    path.mkdir(parents=True)
    (path / "result.json").write_text(json.dumps(result | more))
    (path / "resolved_config.yaml").write_text(config.to_yaml())
    curve = [
        {"step": step, "split": "val", "auc": None if auc is None else auc - 1 / step} for step in (10, 20)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve))
    return path


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    for seed, auc in DENSE.items():
        write_run(tmp_path / "runs" / f"dense{seed}", seed=seed, auc=auc)
        write_run(tmp_path / "runs" / f"tt{seed}", "tt", seed=seed, auc=auc - LOSS[seed])
    return tmp_path / "runs"


def test_seeds_are_aggregated_and_losses_paired(seeds: Path) -> None:
    dense, tt = summarise(load_runs([seeds]))
    assert (dense.name, tt.name) == ("dense (n=3)", "tt 100x (n=3)")
    assert dense.auc_loss is None
    assert tt.auc is not None
    assert tt.auc_loss is not None
    assert dense.auc is not None
    assert dense.auc.mean == pytest.approx(statistics.fmean(DENSE.values()))
    assert tt.auc_loss.mean == pytest.approx(-statistics.fmean(LOSS.values()))
    assert tt.auc_loss.std == pytest.approx(statistics.stdev(LOSS.values()))
    # Pairing removes what the seeds have in common.
    assert dense.auc.std is not None
    assert tt.auc_loss.std < dense.auc.std
    assert "-0.0040±.0020" in comparison_table(load_runs([seeds]))


def test_a_seed_that_ran_twice_counts_once(tmp_path: Path) -> None:
    for folder, method in (("a", "tt"), ("b", "qr")):
        write_run(tmp_path / folder / "dense", auc=0.76)
        write_run(tmp_path / folder / method, method, auc=0.75)
    table = comparison_table(load_runs([tmp_path]))
    assert "±" not in table
    assert "(n=" not in table
    dense = summarise(load_runs([tmp_path]))[0]
    assert (dense.name, dense.seeds, len(dense.runs)) == ("dense", 1, 2)
    assert dense.auc is not None
    assert (dense.auc.mean, dense.auc.std, dense.auc.count) == (0.76, None, 1)


def test_repeats_that_differ_are_averaged_before_the_seeds_are(tmp_path: Path) -> None:
    for folder, seed, auc in (("a", 0, 0.76), ("b", 0, 0.77), ("c", 1, 0.785)):
        write_run(tmp_path / folder, seed=seed, auc=auc)
    write_run(tmp_path / "tt0", "tt", seed=0, auc=0.755)
    write_run(tmp_path / "tt1", "tt", seed=1, auc=0.775)
    dense, tt = summarise(load_runs([tmp_path]))
    assert dense.name == "dense (n=2)"
    assert dense.auc is not None
    assert tt.auc_loss is not None
    assert dense.auc.mean == pytest.approx((0.765 + 0.785) / 2)
    assert dense.auc.std == pytest.approx(statistics.stdev((0.765, 0.785)))
    assert tt.auc_loss.mean == pytest.approx(-0.01)
    assert tt.auc_loss.std == pytest.approx(0)


def test_losses_are_paired_with_the_same_configuration_only(tmp_path: Path) -> None:
    write_run(tmp_path / "dense", seed=0, auc=0.76)
    write_run(tmp_path / "other_seed", "tt", seed=1, auc=0.75)
    write_run(tmp_path / "other_epochs", "tt", seed=0, auc=0.75, config={"epochs": 2})
    write_run(tmp_path / "threshold", "tt", seed=0, auc=0.75, config={"method_threshold": 10})
    losses = {s.runs[0].path.name: s.auc_loss for s in summarise(load_runs([tmp_path]))}
    assert losses["other_seed"] is None
    assert losses["other_epochs"] is None
    assert losses["threshold"] is not None
    assert losses["threshold"].mean == pytest.approx(-0.01)


def test_table_fits_its_width(seeds: Path, tmp_path: Path) -> None:
    write_run(seeds / ("long_name_" * 9), "robe", auc=0.7, compress_rate=12345)
    write_run(
        seeds / ("long_name_" * 9 + "b"), "robe", seed=9, auc=None, compress_rate=12345, config={"epochs": 3}
    )
    table = comparison_table(load_runs([seeds])).splitlines()
    rows = table[: 2 + 4]
    assert max(map(len, rows)) <= TABLE_WIDTH
    assert rows[0].split() == [
        *("run", "method", "emb.", "MB", "ratio", "AUC", "ΔAUC", "logloss", "samples/s", "ms/step")
    ]
    assert "…" in "".join(rows)
    assert "tt 100x (n=3) " in "".join(rows)


def test_footnotes_say_what_the_figures_mean(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "qr", shortfall="qr reaches 9x instead of 100x", best_auc=0.8123)
    write_run(tmp_path / "b", status="interrupted")
    table = comparison_table(load_runs([tmp_path]))
    for text in (
        "on the val split",
        "best possible AUC",
        "0.8123",
        "qr: qr reaches 9x",
        "interrupted after step 20",
    ):
        # Wherever lines are wrapped.
        assert text in " ".join(table.split())


def test_a_long_shortfall_keeps_to_the_width(tmp_path: Path) -> None:
    tables = [TableSpec(name=f"t{rows}", num_embeddings=rows, embedding_dim=16) for rows in (150, 5000)]
    shortfall = compress(tables, "qr", 1000).shortfall
    assert shortfall is not None
    write_run(tmp_path / "a", "qr", shortfall=shortfall)
    lines = comparison_table(load_runs([tmp_path])).splitlines()
    assert max(map(len, lines)) <= TABLE_WIDTH
    assert shortfall in " ".join(line.strip() for line in lines)


def test_unknown_figures_are_dashes(tmp_path: Path) -> None:
    write_run(tmp_path / "a", auc=None, logloss=None, samples_per_second=None, step_ms_p50=None)
    assert comparison_table(load_runs([tmp_path])).splitlines()[2].split()[4:] == ["-"] * 5


def test_directories_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no finished run"):
        load_runs([tmp_path])
    run = write_run(tmp_path / "a")
    assert [found.path for found in load_runs([run, tmp_path, run])] == [run]
    (run / "result.json").write_text('{"auc": 1}')
    with pytest.raises(DataError, match="lacks logloss, embedding_bytes"):
        load_runs([run])
    (run / "result.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as a run"):
        load_runs([run])


class Page(HTMLParser):
    """Collects what a browser would fetch, and the elements left open."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [
            f"{name}={value}"
            for name, value in attrs
            if name in ("src", "href", "xlink:href", "data") and not (value or "").startswith("#")
        ]


def test_html_is_one_self_contained_file(seeds: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_run(seeds / "evil", "robe", config={"data_dir": "<script>alert(1)</script>"})
    files = write_report(load_runs([seeds]), tmp_path / "report")
    assert [file.name for file in files] == ["report.html", "comparison.png", "comparison.svg"]
    assert files[1].read_bytes().startswith(b"\x89PNG")
    text = files[0].read_text()
    page = Page()
    page.feed(text)
    assert page.fetched == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert page.tags.count("svg") == 1
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    # The only addresses are the names of SVG's own vocabularies.
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    for expected in ("t_cat_0", "100.0×", "-0.00400±.00200", "compress_rate: 100.0", "torch 2.13.0"):
        assert expected in text


def test_equal_runs_give_equal_pictures(seeds: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one, two = (write_report(load_runs([seeds]), tmp_path / name) for name in ("one", "two"))
    assert one[2].read_bytes() == two[2].read_bytes()


def test_without_matplotlib_the_report_says_how_to_get_it(
    seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(html_module, "have_matplotlib", lambda: False)
    files = write_report(load_runs([seeds]), tmp_path / "report")
    assert [file.name for file in files] == ["report.html"]
    assert "pip install 'recemb[plots]'" in capsys.readouterr().err
    assert "pip install" in files[0].read_text()
