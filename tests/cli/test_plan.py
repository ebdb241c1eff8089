"""``recemb plan``: what it prints and writes, and its exit codes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recemb.cli import plan_calibrate
from recemb.errors import ConfigError
from recemb.planner.costs import UNITS, default_costs, read_costs
from recemb.planner.presets import PRESETS
from recemb.torchrec_io import load_plan

Recemb = Callable[..., Any]
KAGGLE = ("plan", "--preset", "criteo_kaggle", "--device", "cuda", "--method", "qr", "--compress_rate", "4")


def test_the_plan_fits_a_terminal_and_names_what_matters(recemb: Recemb, tmp_path: Path) -> None:
    answer = recemb(*KAGGLE, "--world_size", "16", "--hbm", "80GB", "--output", str(tmp_path / "plan.json"))
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert max(map(len, lines)) <= 100
    head = next(line for line in lines if line.startswith("table "))
    assert head.split() == ["table", "method", "dense", "->", "stored", "ratio", "sharding", "ranks", "ms"]
    assert sum(line.startswith("t_cat_") for line in lines) == 26
    assert sum("<- slowest" in line for line in lines) == 1
    assert any(line.startswith("bottleneck: rank ") for line in lines)
    compared = [line.split("  ")[0] for line in lines if line.startswith(("qr 4x, ", "dense "))]
    assert compared == [
        "qr 4x, this plan",
        "dense",
        *(f"qr 4x, TW by {rule}" for rule in ("size", "dim", "lookups", "log size x lookups", "ms (LPT)")),
    ]
    document = json.loads((tmp_path / "plan.json").read_text())
    steps = {line["plan"]: line["ms"] for line in document["estimate"]["compared"]}
    assert steps["qr 4x, this plan"] <= min(ms for name, ms in steps.items() if name.startswith("qr"))
    assert load_plan(tmp_path / "plan.json", world_size=16).plan
    assert "torch" in document["estimate"]["costs"]["constants"]["hbm_bandwidth"]["origin"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--method", "robe", "--compress_rate", "4"), 0),
        (("--method", "qr", "--compress_rate", "10000"), 0),
        (("--device", "cuda", "--hbm", "100MB", "--ddr", "100MB", "--local_world_size", "1"), 4),
    ],
)
def test_what_is_said_fits_a_terminal(recemb: Recemb, words: tuple[str, ...], code: int) -> None:
    answer = recemb("plan", "--preset", "criteo_kaggle", "--world_size", "2", *words)
    assert answer.code == code
    assert max(map(len, (answer.out + answer.err).splitlines())) <= 100
    assert code or re.search("share one array|note: ", answer.out)


def test_json_is_the_file(recemb: Recemb, tmp_path: Path) -> None:
    answer = recemb(*KAGGLE, "--world_size", "2", "--format", "json", "--output", str(tmp_path / "plan.json"))
    assert json.loads(answer.out) == json.loads((tmp_path / "plan.json").read_text())
    ranks = json.loads(answer.out)["estimate"]["ranks"]
    assert [rank["rank"] for rank in ranks] == [0, 1]
    assert max(rank["ms"] for rank in ranks) == pytest.approx(json.loads(answer.out)["estimate"]["step_ms"])


def test_the_part_kept_free_of_a_cpu(recemb: Recemb) -> None:
    words = ("plan", "--preset", "criteo_kaggle", "--ddr", "2.34GB", "--world_size", "1")
    assert recemb(*words, "--reserved", "0").code == 0
    assert recemb(*words, "--reserved", "0.5").code == 4


def _flags(text: str) -> list[list[str]]:
    """The changes that an error offers, as flags."""
    offered = text.split("one of:")[1]
    return [
        shlex.split(match[0]) for match in re.finditer(r"--(?:compress_rate|hbm|ddr|world_size) \S+", offered)
    ]


def _smaller(flags: list[str]) -> str:
    flag, value = flags[0], float(flags[1])
    return {"--compress_rate": f"{value / 1.01:.6g}", "--world_size": f"{value - 1:.0f}"}.get(
        flag, f"{value - 1e6:.0f}"
    )


def test_a_plan_that_does_not_fit_names_the_smallest_change(recemb: Recemb) -> None:
    """Each change that is offered fits, and a slightly smaller one does not."""
    base = {"compress_rate": "4", "hbm": "240MB", "ddr": "20MB", "world_size": "1"}
    kept = {"local_world_size": "1", "batch_size": "512"}

    def run(**changed: str) -> Any:
        words = [word for name, value in (base | kept | changed).items() for word in (f"--{name}", value)]
        return recemb("plan", "--preset", "criteo_kaggle", "--device", "cuda", "--method", "qr", *words)

    answer = run()
    assert answer.code == 4
    assert re.search(r"t_cat_2 +qr c=\d+ +[\d,]+ +648,398,528", answer.err)
    changes = _flags(answer.err)
    assert {flags[0] for flags in changes} == {"--compress_rate", "--hbm", "--world_size"}
    for flags in changes:
        name = flags[0].removeprefix("--")
        assert run(**{name: flags[1]}).code == 0, flags
        assert run(**{name: _smaller(flags)}).code == 4, flags


def test_one_array_larger_than_a_rank_does_not_fit(recemb: Recemb) -> None:
    words = ("--preset", "criteo_kaggle", "--device", "cuda", "--world_size", "8", "--hbm", "1GB")
    answer = recemb("plan", *words, "--method", "robe", "--compress_rate", "1.5")
    assert answer.code == 4
    assert {flags[0] for flags in _flags(answer.err)} == {"--compress_rate", "--hbm"}
    fits = recemb("plan", *words, "--method", "robe", "--compress_rate", "30")
    assert fits.code == 0
    assert "share one array and must lie on one rank or on all" in fits.out


def test_a_run_is_planned_by_its_configuration(recemb: Recemb, log_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"data_dir: {log_dir}\nembedding_dim: 8\nmethod: md\ncompress_rate: 2\nmethod_threshold: 20\n"
    )
    answer = recemb("plan", "--config", str(tmp_path / "run.yaml"), "--world_size", "2", "--format", "json")
    assert answer.code == 0, answer.err
    document = json.loads(answer.out)
    assert {table["embedding_dim"] for table in document["tables"].values()} == {8}
    assert any("MixedDimension" in table["compression"] for table in document["tables"].values())
    assert list(document["modules"]) == ["sparse_arch.embedding_bag_collection"]


def test_a_run_with_a_cache_is_planned_with_it(recemb: Recemb, log_dir: Path, tmp_path: Path) -> None:
    """Table-wise; and compressing further, should that be what is missing, leaves the cache its bytes."""
    (tmp_path / "run.yaml").write_text(
        f"data_dir: {log_dir}\nembedding_dim: 16\nmethod: qr\ncompress_rate: 2\nmethod_threshold: 200\n"
        "cache_fraction: 0.05\noptimizer: sgd\nbatch_size: 8\n"
    )
    words = ("plan", "--config", str(tmp_path / "run.yaml"), "--world_size", "1", "--reserved", "0")
    answer = recemb(*words, "--format", "json")
    assert answer.code == 0, answer.err
    document = json.loads(answer.out)
    cached = [name for name, table in document["tables"].items() if "HotRows" in table["compression"]]
    assert len(cached) > 4
    (module,) = document["modules"].values()
    assert {module[name]["sharding_type"] for name in cached} == {"table_wise"}
    assert len(re.findall(r"qr c=\d+ \+hot", recemb(*words).out)) == len(cached)
    needed = document["estimate"]["ranks"][0]["ddr"]
    small = recemb(*words, "--ddr", str(int(0.97 * needed)))
    assert small.code == 4
    changes = {flags[0]: flags[1] for flags in _flags(small.err)}
    ddr = ("--ddr", str(int(0.97 * needed)))
    assert recemb(*words, *ddr, "--compress_rate", changes["--compress_rate"]).code == 0
    smaller = _smaller(["--compress_rate", changes["--compress_rate"]])
    assert recemb(*words, *ddr, "--compress_rate", smaller).code == 4


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "give one of --config"),
        (("--preset", "criteo_kaggle", "--statistics", "x"), "not --preset and --statistics"),
        (("--preset", "criteo_kaggle", "--method", "tt"), "needs --compress_rate"),
        (("--preset", "criteo_kaggle", "--compress_rate", "10"), "method is dense"),
        (("--preset", "criteo_kaggle", "--world_size", "12"), "--world_size 16"),
        (("--preset", "criteo_kaggle", "--hbm", "many"), "write e.g. 80GB"),
        (("--preset", "criteo_kaggle", "--hbm", "0"), "more than 0"),
        (("--preset", "criteo_kaggle", "--reserved", "1"), r"\[0, 1\)"),
        (("--preset", "criteo_kaggle", "--method_threshold", "-5"), "'-5' must be a whole number >= 0"),
        (("--preset", "criteo"), "did you mean criteo_kaggle"),
        (("--preset", "criteo_kaggle", "--hardware", "a100"), "is a GPU and --device is cpu"),
        (("--preset", "criteo_kaggle", "--costs", "no.json"), "cannot be read"),
        (("--calibrate",), "needs --output"),
        (("--preset", "criteo_kaggle", "--output", "."), r"--output \. is a folder"),
        (("--preset", "criteo_kaggle", "--output", "no/plan.json"), "there is no folder no"),
        (("--preset", "criteo_kaggle", "--hbm", "80GB"), r"--hbm 80000000000: .* --ddr"),
        (("--preset", "criteo_kaggle", "--embedding_dim", "8"), "--embedding_dim 8 is of --statistics"),
        (("--statistics", "x", "--device", "cpu"), "a CPU has no HBM"),
    ],
)
def test_wrong_flags(recemb: Recemb, words: tuple[str, ...], named: str) -> None:
    answer = recemb("plan", *words)
    assert answer.code in (2, 3)
    assert re.search(named, answer.err)


def test_rows_by_statistics(recemb: Recemb, log_dir: Path, tmp_path: Path) -> None:
    words = ("--statistics", str(log_dir / "stats.json"), "--embedding_dim", "8", "--method", "qr")
    rates = ("--compress_rate", "2", "--method_threshold", "20", "--hbm", "360kB", "--ddr", "4kB")
    answer = recemb("plan", *words, *rates, "--output", str(tmp_path / "rows.json"))
    assert answer.code == 0, answer.err
    assert max(map(len, answer.out.splitlines())) <= 100
    assert "HotRows(rows=" in answer.out
    document = json.loads((tmp_path / "rows.json").read_text())
    assert sum(table["hbm_bytes"] for table in document["tables"]) <= 306_000
    assert document["ns"] >= document["lower_bound_ns"] * (1 - 1e-9)
    stats = json.loads((log_dir / "stats.json").read_text())
    for table, feature in zip(document["tables"], stats["features"], strict=True):
        assert table["hot_rows"] + table["warm_rows"] + table["cold_rows"] == feature["num_embeddings"]
    tiny = recemb("plan", *words, *rates[:4], "--hbm", "1kB", "--ddr", "1kB")
    assert tiny.code == 4
    assert "--hbm" in tiny.err
    assert recemb("plan", *words, "--hbm", "1MB").code == 2
    adam = recemb("plan", *words, *rates, "--optimizer", "adam")
    assert adam.code == 4
    needed = re.search(r"--hbm (\d+)", adam.err)
    assert needed is not None
    more = recemb("plan", *words, *rates[:4], "--hbm", needed[1], "--ddr", "4kB", "--optimizer", "adam")
    assert more.code == 0, more.err
    assert "optimizer adam" in more.out
    free = ("--hbm", "306kB", "--ddr", "3400B", "--reserved", "0")
    assert recemb("plan", *words, *rates[:4], *free, "--output", str(tmp_path / "free.json")).code == 0
    unreserved = json.loads((tmp_path / "free.json").read_text())
    assert document.pop("reserved") == 0.15
    assert unreserved.pop("reserved") == 0
    assert unreserved == document


@pytest.mark.parametrize("rows", [True, False])
def test_a_rate_that_is_not_reached_is_told(
    recemb: Recemb, log_dir: Path, tmp_path: Path, rows: bool
) -> None:
    source = ("--statistics", str(log_dir / "stats.json")) if rows else ("--preset", "criteo_kaggle")
    ranks = ("--device", "cuda", "--hbm", "80GB", "--ddr", "128GB")
    words = ("plan", *source, *ranks, "--method", "qr", "--compress_rate")
    output = tmp_path / "plan.json"
    answer = recemb(*words, "5000", "--output", str(output))
    assert answer.code == 0, answer.err
    assert max(map(len, answer.out.splitlines())) <= 100
    printed = " ".join(line.strip() for line in answer.out.splitlines())
    told = re.search(r"note: (qr reaches .*x instead of 5000x: .*)", printed)
    assert told is not None
    for document in (output.read_text(), recemb(*words, "5000", "--format", "json").out):
        read = json.loads(document)
        assert (read if rows else read["estimate"])["shortfall"] == told[1]
    reached = recemb(*words, "2", "--method_threshold", "0", "--output", str(output))
    assert "note:" not in reached.out
    assert not json.loads(output.read_text()).get("shortfall")


def test_calibration_is_read_back(recemb: Recemb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_calibrate, "_ROWS", 2000)
    monkeypatch.setattr(plan_calibrate, "_BATCH", 500)
    monkeypatch.setattr(plan_calibrate, "_REPEATS", 1)
    path = tmp_path / "costs.json"
    answer = recemb("plan", "--calibrate", "--device", "cpu", "--output", str(path))
    assert answer.code == 0, answer.err
    costs = read_costs(path)
    assert costs.constants.keys() == UNITS.keys()
    for name in ("ddr_bandwidth", "flops", "tt_forward", "md_backward"):
        assert costs[name] > 0
        assert "threads, 20" in costs.constants[name].origin
    planned = recemb("plan", "--preset", "criteo_kaggle", "--costs", str(path), "--world_size", "2")
    assert planned.code == 0, planned.err
    assert costs.name in planned.out
    other = recemb("plan", "--preset", "criteo_kaggle", "--costs", str(path), "--device", "cuda")
    assert other.code == 2
    document = json.loads(path.read_text())
    document["constants"]["flops"]["unit"] = "GFLOP/s"
    del document["constants"]["id_skew"]
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"2 problems(?s:.*)flops: unit(?s:.*)id_skew needs"):
        read_costs(path)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_constant_has_unit_and_origin(device: str) -> None:
    for hardware in (None, "a100", "h100") if device == "cuda" else (None,):
        costs = default_costs(device, hardware)
        assert costs.constants.keys() == UNITS.keys()
        for name, constant in costs.constants.items():
            assert constant.unit == UNITS[name]
            assert len(constant.origin) > 8


def test_presets() -> None:
    sizes = {name: sum(table.dense_numel for table in make().tables) * 4 for name, make in PRESETS.items()}
    assert sizes["criteo_kaggle"] == 2_160_804_928
    assert sizes["mlperf_dlrm_dcnv2"] == 204_184_588 * 128 * 4
    assert sizes["synthetic_10tb"] == pytest.approx(10e12, rel=1e-6)
    assert len(PRESETS["synthetic_10tb"]().tables) == 1000
    assert sum(PRESETS["mlperf_dlrm_dcnv2"]().pooling_factors) == 214
