"""The verb ``prepare``: flags, messages, the table, and what it imports."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recemb.cli import prepare as cli
from recemb.data.prepare_settings import PrepareSettings
from recemb.errors import ConfigError, DataError, Interrupted


def run(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["prepare", *map(str, words)])
    return int(args.run(args))


@pytest.fixture
def train_txt(criteo: SimpleNamespace, tmp_path: Path) -> Path:
    path = tmp_path / "train.txt"
    path.write_bytes(criteo.make_tsv(400))
    return path


def test_criteo_summary_and_next_command(
    train_txt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        "--input",
        train_txt,
        "--output",
        tmp_path / "out",
        "--val_fraction",
        "1/8",
        "--test_fraction",
        "1/8",
    )
    assert run(*command) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == "criteo_kaggle:"
    assert [line.split()[:3] for line in lines[1:4]] == [
        ["train", "300", "rows,"],
        ["val", "50", "rows,"],
        ["test", "50", "rows,"],
    ]
    table = [line for line in lines if line.startswith("cat_")]
    assert [line.split()[0] for line in table] == [f"cat_{i}" for i in range(26)]
    assert max(map(len, lines[1:-1])) <= 100
    assert lines[-1].startswith(f"next: recemb train --data_dir {tmp_path / 'out'} --method ")
    assert run(*command) == 0
    again = capsys.readouterr().out
    assert again.startswith(f"{tmp_path / 'out'}: already prepared with these settings, nothing to do\n{out}")


def test_table_fits_100_columns_at_the_largest_sizes() -> None:
    feature = {
        "name": "cat_25",
        "num_embeddings": 2**32,
        "distinct": 2**32,
        "missing": 4_195_197_692,
        "oov_share": {"train": 1.0, "val": 1.0},
        "top_1_percent_share": 1.0,
    }
    stats: dict[str, Any] = {
        "dataset_name": "criteo_1tb",
        "rows": {"train": 4_195_197_692, "val": 89_137_318, "test": 89_137_318},
        "clicks": {"train": 4_195_197_692, "val": 89_137_318, "test": 89_137_318},
        "rejects": 10**9,
        "features": [feature] * 26,
        "best_auc": 0.82,
        "best_logloss": 0.42,
        "best_auc_without_embeddings": 0.61,
    }
    assert max(len(line) for text in cli.summary_lines(stats) for line in text.splitlines()) <= 100


def test_synthetic_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        "--dataset_name",
        "synthetic",
        "--rows",
        "5000",
        "--scale",
        "1/1000",
        "--output",
        tmp_path / "s",
    )
    assert run(*command) == 0
    first = capsys.readouterr().out
    assert "  train          4,500 rows, 2" in first
    assert "best possible AUC 0.8" in first
    assert run(*command) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_defaults_are_those_of_the_library() -> None:
    fields = PrepareSettings.__dataclass_fields__
    for flag in ("min_count", "max_ind_range", "bad_rows", "max_bad_rows"):
        assert cli._DEFAULTS[flag] == fields[flag].default
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["prepare", "--output", "x"])
    assert args.dataset_name == fields["dataset_name"].default
    for flag in ("val_fraction", "test_fraction"):
        assert float(getattr(args, flag)) == float(fields[flag].default)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--rows", "5"], "--rows is for --dataset_name synthetic only"),
        (["--dataset_name", "synthetic", "--input", "a"], "--input is for Criteo logs only"),
        (["--dataset_name", "synthetic", "--min_count", "0"], "--min_count is for Criteo logs only"),
        (["--dataset_name", "criteo_1tb"], "--input: give the TSV files of criteo_1tb"),
        (["--input", "a", "--memory_budget", "lots"], "--memory_budget: 'lots' is not a size"),
        (["--input", "a", "--val_fraction", "half"], "--val_fraction: 'half'"),
    ],
)
def test_wrong_flags_are_named(tmp_path: Path, words: list[str], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run("--output", tmp_path / "out", *words)
    assert named in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_rows_flags_reach_the_reader(
    train_txt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_txt.write_bytes(train_txt.read_bytes() + b"junk\n")
    with pytest.raises(DataError, match="line 401"):
        run("--input", train_txt, "--output", tmp_path / "out")
    assert (
        run("--input", train_txt, "--output", tmp_path / "out", "--bad_rows", "skip", "--max_bad_rows", "1")
        == 0
    )
    assert "1 bad rows left out, see rejects.jsonl" in capsys.readouterr().out


def test_ctrl_c_is_resumable(train_txt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recemb.data import raw_log

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(raw_log.RawLog, "parse", interrupted)
        with pytest.raises(Interrupted, match="same command goes on") as caught:
            run("--input", train_txt, "--output", tmp_path / "out")
    assert caught.value.exit_code == 75
    assert run("--input", train_txt, "--output", tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        ([f"day_{i}" for i in range(24)], 0),
        (sorted(f"day_{i}" for i in range(24)), 2),  # a shell's day_*: 10..19 before 2, 20..23 before 3
        (["train.txt"], 0),
        (["day_1.gz", "day_0.gz"], 1),
    ],
)
def test_order_that_is_not_time_is_noticed(names: list[str], pairs: int) -> None:
    assert len(cli.out_of_order([Path("d2") / name for name in names])) == pairs


def test_order_warning_goes_to_stderr(
    train_txt: Path, tmp_path: Path, criteo: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "day_10").write_bytes(criteo.make_tsv(50, seed=1))
    (tmp_path / "day_2").write_bytes(criteo.make_tsv(50, seed=2))
    assert run("--input", tmp_path / "day_10", tmp_path / "day_2", "--output", tmp_path / "out") == 0
    captured = capsys.readouterr()
    assert "warning" in captured.err
    assert "day_2 comes after" in captured.err
    assert "comes after" not in captured.out


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GB", 10**9), ("512 MiB", 2**29), ("2g", 2 * 10**9), ("1.5kb", 1500), ("4096", 4096), ("7B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert cli.parse_size(text, "--memory_budget") == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1TBX", "1e9", "1 G B x"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="--memory_budget"):
        cli.parse_size(text, "--memory_budget")


def test_imports_stay_light() -> None:
    """The verb loads nothing heavy to show its help, and no torch at all to do its work."""
    script = (
        "import sys, argparse\n"
        "from recemb.cli import prepare\n"
        "prepare.add_parser(argparse.ArgumentParser().add_subparsers())\n"
        "assert not {'numpy', 'pyarrow', 'torch', 'tqdm'} & set(sys.modules), sorted(sys.modules)\n"
        "import recemb.data, recemb.data.prepare\n"
        "assert not {'torch', 'torchrec', 'matplotlib'} & set(sys.modules)\n"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=environment)
