"""``recemb bench``: what it imports, where it works, and a run of each program from end to end."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import recemb as package

Recemb = Callable[..., Any]
ROOT = Path(str(package.__file__)).resolve().parents[1]
HEAVY = ("torch", "torchrec", "fbgemm_gpu", "numpy", "matplotlib", "tqdm")


@pytest.fixture
def green(tmp_path: Path) -> str:
    """A test file that passes, in place of the operators' own tests."""
    path = tmp_path / "test_green.py"
    path.write_text("def test_it():\n    assert True\n")
    return str(path)


@pytest.mark.parametrize(
    "words",
    [["bench", "--help"], ["bench", "ops", "--help"], ["bench", "train", "-h"], ["bench", "cache", "-h"]],
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    script = (
        "import sys; from recemb.cli.main import main\ntry: code = main(sys.argv[1:])\n"
        "except SystemExit as stop: code = stop.code\n"
        f"print('HEAVY', sorted(set({HEAVY!r}) & set(sys.modules)), code)"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "HEAVY [] 0"
    assert f"usage: recemb {' '.join(words[:-1])}" in done.stdout


def test_outside_a_checkout_it_says_so(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "recemb", tmp_path / "recemb", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "recemb", "bench", "ops"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "recemb bench: error: the benchmarks are not part of an installed recemb" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["opps"], "invalid choice: 'opps'; did you mean ops?"),
        (["ops", "--rows", "0"], "argument --rows: 0 must be >= 1"),
        (["ops", "--rows", "1e6"], "argument --rows: 1e6 is not a whole number"),
        (["ops", "--preset", "quick", "--rows", "10"], "--preset quick fixes --rows; leave one of them out"),
        (["ops", "--bath", "3"], "unrecognized arguments: --bath"),
        (["train", "--scale", "2"], "argument --scale: 2 must lie in (0, 1]"),
        (["train", "--threads", "0"], "argument --threads: 0 must be >= 1"),
        (["inference", "--threads", "0"], "argument --threads: 0 must be >= 1"),
        (["inference", "--scale", "1/0"], "argument --scale: 1/0 is not a fraction; e.g. 1/100"),
        (["inference", "--compress_rate", "-3"], "argument --compress_rate: -3 must be a number >= 1"),
        (["scaling", "--scale", "0"], "argument --scale: 0 must lie in (0, 1]"),
        (["scaling", "--batch", "5", "--processes", "2"], "--batch 5 does not divide among --processes 2"),
        (["cache", "--threads", "0"], "argument --threads: 0 must be >= 1"),
        (["cache", "--compress_rate", "nan"], "argument --compress_rate: nan must be a number >= 1"),
        (["cache", "--fractions", "0"], "--fractions must lie in (0, 1]"),
        (["cache", "--data_dir", "x"], "say where they go with --runs"),
    ],
)
def test_usage_errors_exit_2(recemb: Recemb, words: list[str], message: str) -> None:
    code, out, err = recemb("bench", *words)
    assert (code, out) == (2, "")
    assert message in err


def test_no_figure_is_printed_on_red_tests(recemb: Recemb, tmp_path: Path) -> None:
    red = tmp_path / "test_red.py"
    red.write_text("def test_it():\n    assert 1 == 2\n")
    output = tmp_path / "out"
    for program in ("ops", "train", "cache"):
        code, out, err = recemb("bench", program, "--tests", str(red), "--output", str(output))
        assert (code, out) == (2, "")
        assert "no speed is reported while the operators' tests are red" in err
    assert not output.exists()


def test_ops_from_end_to_end(recemb: Recemb, tmp_path: Path, green: str) -> None:
    output = tmp_path / "out"
    sizes = ["--rows", "1000", "--batch", "16", "--ranks", "4", "--methods", "tt", "hashing", "dense"]
    code, out, err = recemb(
        "bench", "ops", *sizes, "--rounds", "2", "--tests", green, "--output", str(output)
    )
    assert code == 0, err
    assert "N=1k D=16 B=16 1-hot zipf ids, rowwise adagrad" in out
    assert max(map(len, out.splitlines())) <= 100
    with (output / "ops_custom.csv").open() as handle:
        rows = {(row["case"], row["path"]): row for row in csv.DictReader(handle)}
    ours = {(case, path) for case in ("TT R=4", "hashing to N/4", "uncompressed")
            for path in ("op", "module", "forward")}  # fmt: skip
    peers = {("fbgemm TBE", "op"), ("TBE in a module", "module"), ("fbgemm TBE", "forward"),
             ("nn.EmbeddingBag", "op"), ("F.embedding_bag", "forward")}  # fmt: skip
    assert ours | peers <= set(rows)
    # tltorch is optional: measured, or named as absent.
    assert ("tltorch R=4", "op") in rows or "absent peers: tltorch R=4: " in out
    assert float(rows["fbgemm TBE", "op"]["ratio_tbe"]) == 1
    assert rows["TT R=4", "module"]["like"] == "fbgemm TBE (module)"
    assert rows["uncompressed", "op"]["table_bytes"] == str(1000 * 16 * 4)
    assert rows["hashing to N/4", "op"]["table_bytes"] == str(250 * 16 * 4)
    for row in rows.values():
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        assert row["rounds"] == "2"
    assert (output / "ops_custom.png").stat().st_size > 0
    assert (output / "ops_custom.svg").read_text().startswith("<svg")


def test_tables_beyond_the_memory_limit_are_named(recemb: Recemb, green: str) -> None:
    sizes = ["--rows", "100000", "--batch", "16", "--methods", "hashing", "dense", "--paths", "op"]
    code, out, err = recemb("bench", "ops", *sizes, "--rounds", "1", "--memory_gb", "0.02", "--tests", green)
    assert code == 0, err
    assert "not measured: nn.EmbeddingBag: its tables take 6.4 MB, at most 5.6 MB are given to them" in out
    assert {"fbgemm", "hashing", "uncompressed"} <= {line.split()[0] for line in out.splitlines() if line}


def test_train_from_end_to_end(recemb: Recemb, tmp_path: Path, green: str) -> None:
    sizes = ["--scale", "1/10000", "--batch", "32", "--rounds", "2"]
    code, out, err = recemb("bench", "train", *sizes, "--tests", green, "--output", str(tmp_path / "out"))
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 100
    with (tmp_path / "out" / "train_kaggle.csv").open() as handle:
        dense, compressed = csv.DictReader(handle)
    assert (dense["model"], dense["speed_ratio"]) == ("fbgemm TBE", "1")
    assert compressed["model"] == "7 largest TT R=32"
    for row in (dense, compressed):
        assert float(row["samples_per_second"]) == pytest.approx(32e6 / float(row["p50_us"]), rel=1e-3)
        assert (row["tables"], row["batch"], row["dense_optimizer"]) == ("26", "32", "adagrad")
        assert 0 < float(row["floor_us"]) < float(row["p50_us"])
    # Linear layers: 13-512-256-16, and 16 + 27 * 26 / 2 = 367 features into 512-512-256-1.
    linear = 13 * 512 + 512 * 256 + 256 * 16 + 367 * 512 + 512 * 512 + 512 * 256 + 256
    assert float(dense["gflop_s"]) * float(dense["p50_us"]) * 1e3 == pytest.approx(6 * 32 * linear, rel=0.01)
    assert float(compressed["gflop_s"]) * float(compressed["p50_us"]) * 1e3 > 6 * 32 * linear
    assert (tmp_path / "out" / "train_kaggle.svg").read_text().count("7 largest TT R=32") == 1


def test_cache_from_end_to_end(recemb: Recemb, tmp_path: Path, green: str, log_dir: Path) -> None:
    output = tmp_path / "out"
    sizes = ["--rows", "2000", "--batch", "64", "--rank", "4", "--steps", "70", "--rounds", "5"]
    small = "--batch_size 400 --embedding_dim 4 --dense_arch_layer_sizes 8,4 --over_arch_layer_sizes 8,1"
    aucs = ["--data_dir", str(log_dir), "--runs", str(tmp_path / "runs"), "--compress_rate", "5"]
    code, out, err = recemb(
        *("bench", "cache", *sizes, "--fractions", "0.05", "--policies", "lfu", "--tests", green),
        *(*aucs, "--seeds", "1", "--train", small, "--output", str(output)),
    )
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 110
    with (output / "cache_zipf.csv").open() as handle:
        plain, cached = csv.DictReader(handle)
    assert (plain["policy"], plain["ratio"], plain["hit_rate"]) == ("", "1", "0")
    assert (cached["policy"], cached["cached_rows"]) == ("lfu", "100")
    assert 0.3 < float(cached["hit_rate"]) <= float(cached["ideal_hit_rate"]) + 0.1
    with (output / "cache_auc.csv").open() as handle:
        rows = {row["setting"]: row for row in csv.DictReader(handle)}
    assert list(rows) == ["dense", "tt", "tt+cache-0.05-lfu", "tt-bytes-of-0.05"]
    assert float(rows["dense"]["lost"]) == 0
    assert float(rows["tt"]["gained"]) == 0
    # A cache is on top of the trains; the trains of as many bytes are as large as both.
    sizes_of = {name: int(row["embedding_bytes"]) for name, row in rows.items()}
    assert sizes_of["tt+cache-0.05-lfu"] > sizes_of["tt"]
    assert sizes_of["tt-bytes-of-0.05"] == pytest.approx(sizes_of["tt+cache-0.05-lfu"], rel=0.05)
    assert (output / "cache.png").stat().st_size > 0
