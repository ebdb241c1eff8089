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
from recemb.training.plots import comparison_figure, styles_of
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
        "best_step": 20,
        "steps_per_epoch": 20,
        "limited_rows": {},
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
    for contents in ("one", "two"):
        # Nothing but the directory tells these apart.
        path = seeds / ("long_name_" * 9 + contents)
        write_run(path, "robe", auc=0.7, compress_rate=12345, config={"data_dir": "other"}, data=contents)
    runs = load_runs([seeds])
    rows = comparison_table(runs).partition("\nAUC and")[0].splitlines()
    assert max(map(len, rows)) <= TABLE_WIDTH
    assert rows[0].split() == [
        *("run", "method", "emb.", "MB", "ratio", "AUC", "ΔAUC", "logloss", "samples/s", "ms/step")
    ]
    # What the first column has no room for is below, and nothing is left out.
    width = rows[0].index("method")
    names = "".join("".join(row[:width].split()) for row in rows[2:])
    assert names == "".join("".join(setting.name.split()) for setting in summarise(runs))
    assert "long_name_two: robe 12345x other".replace(" ", "") in names


@pytest.mark.parametrize(
    ("first", "second", "labels"),
    [
        ({}, {"learning_rate": 0.01}, ["lr 0.001", "lr 0.01"]),
        ({}, {"batch_size": 1024, "test_batch_size": 64}, ["batch 512", "batch 1024"]),
        ({}, {"patience": 3, "epochs": 9}, ["epochs 1", "epochs 9 patience 3"]),
        ({}, {"optimizer": "sgd", "learning_rate": 0.001}, ["adam eps 1e-08", "sgd"]),
        ({}, {"method_threshold": 10}, ["threshold 200", "threshold 10"]),
        ({}, {"interaction_type": "dcn"}, ["original", "dcn"]),
        ({}, {"over_arch_layer_sizes": "64,1"}, ["top 512,512,256,1", "top 64,1"]),
        ({"cache_fraction": 0.01}, {"cache_fraction": 0.0100001}, ["cache 0.01 lfu", "cache 0.0100001 lfu"]),
        (
            {"cache_fraction": 0.5},
            {"cache_fraction": 0.5, "cache_policy": "lru"},
            ["cache 0.5 lfu", "cache 0.5 lru"],
        ),
        (
            {"cache_fraction": 0.5, "cache_refresh_every": 8},
            {"cache_fraction": 0.5},
            ["cache 0.5 lfu refresh 8", "cache 0.5 lfu refresh 64"],
        ),
    ],
)
def test_labels_hold_the_settings_that_differ(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], labels: list[str]
) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", "tt", seed, 0.75, config=first)
        write_run(tmp_path / f"b{seed}", "tt", seed, 0.76, config=second)
    settings = summarise(load_runs([tmp_path]))
    assert [setting.name for setting in settings] == [f"tt 100x {label} (n=2)" for label in labels]
    assert [setting.auc.mean for setting in settings if setting.auc] == [0.75, 0.76]


def test_equal_labels_are_told_apart_by_directory(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_run(tmp_path / folder / "tt", "tt", data=f"contents of {folder}")
    names = [setting.name for setting in summarise(load_runs([tmp_path]))]
    assert names == ["a/tt: tt 100x", "b/tt: tt 100x"]


def test_relative_and_absolute_paths_of_equal_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [write_run(tmp_path / folder, "tt", data=f"contents of {folder}") for folder in ("a", "b")]
    names = [setting.name for setting in summarise(load_runs([Path("a"), paths[1]]))]
    assert names == ["a: tt 100x", "b: tt 100x"]


def test_a_run_of_another_version_may_have_other_settings(tmp_path: Path) -> None:
    run = write_run(tmp_path / "tt", "tt")
    with (run / "config.yaml").open("a") as file:
        file.write("of_the_future: 3\n")
    assert [setting.name for setting in summarise(load_runs([tmp_path]))] == ["tt 100x"]


def test_ranks_are_told_apart_and_compared(tmp_path: Path) -> None:
    write_run(tmp_path / "dense", auc=0.76)
    one = {"world_size": 2, "sharding": {"t": "table_wise on 0"}, "config": {"batch_size": 256}}
    write_run(tmp_path / "tt1", "tt", auc=0.75)
    write_run(tmp_path / "tt2", "tt", auc=0.75, **one)
    _, *tts = summarise(load_runs([tmp_path]))
    assert [tt.name for tt in tts] == ["tt 100x ranks 1", "tt 100x ranks 2"]
    assert [tt.auc_loss.mean for tt in tts if tt.auc_loss] == pytest.approx([-0.01, -0.01])


@pytest.mark.parametrize(
    "config",
    [
        {"checkpoint_freq": 10},
        {"data_dir": str(Path.cwd() / "data")},
        {"data_dir": "./data/"},
        {"dataset_name": "synthetic"},
        {"dist_timeout_seconds": 10},
        {"resume": True},
        {"test_batch_size": 100},
        {"patience": 2, "validation_freq_within_epoch": 20},
        {"dcn_num_layers": 2},
        {"eps": 1e-8},
    ],
    ids=str,
)
def test_what_changes_no_figure_neither_parts_runs_nor_their_pairs(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    write_run(tmp_path / "dense", auc=0.76)
    write_run(tmp_path / "tt0", "tt", auc=0.75)
    write_run(tmp_path / "tt1", "tt", auc=0.75, config=config)
    (tmp_path / "tt1").rename(tmp_path / "moved")
    _, tt = summarise(load_runs([tmp_path]))
    assert (tt.name, len(tt.runs)) == ("tt 100x", 2)
    assert tt.auc_loss is not None
    assert tt.auc_loss.mean == pytest.approx(-0.01)
    assert "no ΔAUC" not in comparison_table(load_runs([tmp_path]))


def test_data_are_known_by_their_contents(tmp_path: Path) -> None:
    write_run(tmp_path / "dense", auc=0.76, data="a1", config={"data_dir": "here"})
    write_run(tmp_path / "copy", "tt", auc=0.75, data="a1", config={"data_dir": "there/here"})
    write_run(tmp_path / "again", "robe", auc=0.75, data="b2", config={"data_dir": "here"})
    losses = {setting.method: setting.auc_loss for setting in summarise(load_runs([tmp_path]))}
    assert losses["tt"] is not None
    assert losses["robe"] is None
    why = "no ΔAUC for robe 100x: dense differs in data (equal in name alone)"
    assert why in comparison_table(load_runs([tmp_path]))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"learning_rate": 0.01}, "learning_rate (0.001, not 0.01)"),
        ({"validation_freq_within_epoch": 19}, "validation_freq_within_epoch (none, not 19)"),
        ({"epochs": 3, "patience": 1}, "epochs (1, not 3), patience (none, not 1)"),
        ({"embedding_dim": 8, "dense_arch_layer_sizes": "512,256,16,8"}, "embedding_dim (16, not 8), "),
        ({"shuffle_batches": False}, "shuffle_batches (yes, not no)"),
        ({"device": "cuda"}, "device (cpu, not cuda)"),
    ],
    ids=str,
)
def test_what_parts_a_run_from_dense_is_told(tmp_path: Path, config: dict[str, Any], told: str) -> None:
    write_run(tmp_path / "dense", auc=0.76)
    write_run(tmp_path / "far", auc=0.76, config={"num_embeddings": 5, "batch_size": 8, "dcn_num_layers": 5})
    write_run(tmp_path / "tt", "tt", auc=0.75, config=config)
    table = comparison_table(load_runs([tmp_path]))
    assert max(map(len, table.splitlines())) <= TABLE_WIDTH
    assert re.search(
        rf"no ΔAUC for tt 100x .*: dense .* differs in {re.escape(told)}", " ".join(table.split())
    )


def test_seeds_without_a_dense_run_are_told(tmp_path: Path) -> None:
    write_run(tmp_path / "dense", auc=0.76)
    for seed in (0, 1, 2):
        write_run(tmp_path / f"tt{seed}", "tt", seed, auc=0.75)
    table = comparison_table(load_runs([tmp_path]))
    assert "-0.0100 " in table
    assert "ΔAUC of tt 100x (n=3): no dense run of seed 1, 2 has an AUC" in table


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


def test_a_setting_looks_the_same_in_both_pictures_and_in_the_key(seeds: Path) -> None:
    pytest.importorskip("matplotlib")
    write_run(seeds / "robe", "robe")
    for index, rate in enumerate((1e-2, 2e-3, 5e-3)):
        write_run(seeds / f"lr{index}", "tt", config={"learning_rate": rate})
    settings = summarise(load_runs([seeds]))
    figure = comparison_figure(settings)
    sizes, curves = figure.axes
    points = [bars.lines[0] for bars in sizes.containers]
    key = figure.legends[0].get_lines()

    def look(line: Any) -> tuple[Any, ...]:
        return line.get_color(), line.get_marker(), line.get_fillstyle(), line.get_alpha()

    assert [look(line) for line in points] == [look(line) for line in key]
    assert [text.get_text().rpartition(" (")[0] for text in figure.legends[0].get_texts()] == [
        setting.name for setting in settings
    ]
    drawn = [look(line) for line in curves.lines]
    runs = [len(setting.runs) for setting in settings]
    assert drawn == [look(line) for line, count in zip(key, runs, strict=True) for _ in range(count)]
    assert len({line.get_color() for line in key}) == len(settings) == 6


def test_many_settings_of_one_method_look_different(tmp_path: Path) -> None:
    for index in range(28):
        write_run(tmp_path / str(index), "tt", config={"learning_rate": (index + 1) / 1000})
    assert len(set(styles_of(summarise(load_runs([tmp_path]))))) == 28


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
