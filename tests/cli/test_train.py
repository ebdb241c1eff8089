"""``recemb train`` end to end on a small log, and its flags against the configuration."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recemb.cli import train
from recemb.training.config import DEFAULT_LEARNING_RATE, RunConfig, parse_config

Recemb = Callable[..., Any]


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser()
    train.add_parser(root.add_subparsers())
    (subparsers,) = [a for a in root._actions if isinstance(a, argparse._SubParsersAction)]
    choice: argparse.ArgumentParser = subparsers.choices["train"]
    return choice


def test_flags_are_the_configurations_fields() -> None:
    launcher = {"nproc_per_node", "max_restarts"}
    flags = {action.dest for action in parser()._actions} - launcher - {"help", "config"}
    assert flags == set(RunConfig.model_fields)


def test_defaults_in_help_are_the_real_ones() -> None:
    config = parse_config({"data_dir": "a", "output": "b"})
    for action in parser()._actions:
        found = re.search(r"\(default ([^\s)]+)\)", action.help or "")
        if found is None or action.dest in ("shuffle_batches", "num_embeddings_per_feature"):
            continue
        value = getattr(config, action.dest)
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        stated = found[1].replace("512,256,D", f"512,256,{config.embedding_dim}")
        assert stated == text or float(stated) == value, action.dest
    rates = next(action.help for action in parser()._actions if action.dest == "learning_rate")
    assert DEFAULT_LEARNING_RATE["rowwise_adagrad"] == DEFAULT_LEARNING_RATE["adagrad"]
    expected = "default {adam:g} for adam, {adagrad:g} for adagrad and rowwise_adagrad, {sgd:g} for sgd"
    assert rates == expected.format(**DEFAULT_LEARNING_RATE)


def test_compare_prints_both_side_by_side(recemb: Recemb, small: list[str], tmp_path: Path) -> None:
    code, out, err = recemb("train", *small, "--method", "tt", "--compress_rate", "5", "--compare", "dense")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows[0][0] == "run"
    assert [row[0] for row in rows[2:4]] == ["dense", "tt"]
    results = {
        name: json.loads((tmp_path / "run" / name / "result.json").read_text()) for name in ("tt", "dense")
    }
    assert rows[3][5] == f"{results['tt']['auc']:.4f}"
    assert rows[3][6] == f"{results['tt']['auc'] - results['dense']['auc']:+.4f}"
    assert "best possible AUC" in out
    assert str(tmp_path / "run" / "tt") in err


def test_config_file_with_flags_on_top(recemb: Recemb, small: list[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("method: robe\ncompress_rate: 1e1\nepochs: 3\nshuffle_batches: false\n")
    flags = ["--config", str(path), "--epochs", "1", "--adagrad", "--shuffle_batches"]
    assert recemb("train", *small, *flags).code == 0
    resolved = (tmp_path / "run" / "resolved_config.yaml").read_text()
    for line in ("method: robe", "epochs: 1", "optimizer: adagrad", "shuffle_batches: true", "eps: 1.0e-08"):
        assert line in resolved.splitlines()
    again = ["--config", str(tmp_path / "run" / "resolved_config.yaml"), "--output", str(tmp_path / "again")]
    assert recemb("train", *again)[0] == 0
    first, second = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("run", "again"))
    assert (first["auc"], first["logloss"]) == (second["auc"], second["logloss"])


def test_problems_are_reported_before_torch_loads(recemb: Recemb, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data_dir: x\nepochs: many\nepochs: 2\n")
    code, out, err = recemb("train", "--config", str(path))
    assert (code, out) == (2, "")
    assert err == f"recemb train: error: {path}:3: key 'epochs' is given twice, first on line 2\n"
    code, _, err = recemb("train", "--batch_size", "0", "--method", "ttt", "--data_dir", "x")
    assert code == 2
    assert err.splitlines()[0] == "recemb train: error: 3 problems in the run configuration:"


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--data_dir", "/nowhere"], 3, "no prepared click log"),
        (["--learning_rate", "1e30", "--optimizer", "sgd"], 5, "no weight was changed by this batch"),
        (["--method", "tt", "--compress_rate", "0.1"], 2, "--compress_rate: should be greater than"),
        (["--dataset_name", "criteo_kaggle"], 2, "holds synthetic"),
    ],
)
def test_exit_codes(recemb: Recemb, small: list[str], flags: list[str], code: int, message: str) -> None:
    answer = recemb("train", *small, *flags)
    assert answer.code == code
    assert message in answer.err
    assert "Traceback" not in answer.err


def test_report_pairs_runs_and_tells_their_settings(
    recemb: Recemb, small: list[str], log_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(log_dir.parent)
    tt = ["train", *small, "--method", "tt", "--compress_rate", "5"]
    runs = {name: ["--output", str(tmp_path / "runs" / name)] for name in ("dense", "tt", "cached", "fast")}
    assert recemb("train", *small, *runs["dense"], "--checkpoint_freq", "3").code == 0
    assert recemb(*tt, *runs["tt"], "--data_dir", f"./{log_dir.name}/", "--test_batch_size", "90").code == 0
    assert recemb(*tt, *runs["cached"], "--cache_fraction", "0.5").code == 0
    assert recemb(*tt, *runs["fast"], "--learning_rate", "0.02").code == 0
    code, out, _ = recemb("report", str(tmp_path / "runs"), "--output", str(tmp_path / "report"))
    assert code == 0
    page = (tmp_path / "report" / "report.html").read_text()
    text = " ".join(out.split())
    for name in ("dense lr 0.001", "tt 5x lr 0.001", "tt 5x cache 0.5 lfu lr 0.001", "tt 5x lr 0.02"):
        assert f"<td class=text>{name}</td>" in page
    why = "no ΔAUC for tt 5x lr 0.02: dense lr 0.001 differs in learning_rate (0.001, not 0.02)"
    assert why in text
    assert why in page
    # Of two compressed runs of three.
    assert len(re.findall(r" [+-]0\.\d{4} ", text)) == 2


def test_prepare_train_report(recemb: Recemb, small: list[str], tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    made = recemb(
        "prepare", "--dataset_name", "synthetic", "--rows", "1500", "--scale", "1/2000", "--output", data
    )
    assert made.code == 0
    assert recemb("train", *small, "--data_dir", data, "--dataset_name", "synthetic").code == 0
    assert recemb("train", *small, "--data_dir", data).code == 2
    code, out, _ = recemb("report", str(tmp_path / "run"), "--output", str(tmp_path / "run" / "report"))
    assert code == 0
    assert out.splitlines()[2].split()[0] == "dense"
    assert (tmp_path / "run" / "report" / "report.html").is_file()
    assert recemb("report", data, "--output", str(tmp_path / "x")).code == 2
