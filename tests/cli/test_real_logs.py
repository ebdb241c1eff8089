"""The licensed Criteo samples beside the checkout go through prepare and train as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from recemb.cli.main import main

SMALL = ["--dense_arch_layer_sizes", "32,16", "--over_arch_layer_sizes", "64,1"]


def _train(data: Path, output: Path, *flags: str) -> dict[str, object]:
    assert main(["train", "--data_dir", str(data), "--output", str(output), *SMALL, *flags]) == 0
    result: dict[str, object] = json.loads((output / "result.json").read_text())
    return result


@pytest.mark.parametrize("method", ["tt", "robe"])
def test_kaggle_sample_trains_compressed(
    method: str, shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    sample = shared_data("criteo_kaggle/train_sample.tsv.gz")
    data = tmp_path / "data"
    assert main(["prepare", "--input", str(sample), "--output", str(data)]) == 0
    stats = json.loads((data / "stats.json").read_text())
    assert sum(stats["rows"].values()) == 117_335
    result = _train(data, tmp_path / "run", "--method", method, "--compress_rate", "10")
    assert result["compression_ratio"] == pytest.approx(10, rel=0.05)
    # One epoch of a small model; without its tables it stays at 0.71.
    assert float(str(result["auc"])) > 0.72


def test_terabyte_sample_trains_compressed(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    sample = shared_data("criteo_1tb/day_0_sample.gz")
    data = tmp_path / "data"
    command = ["prepare", "--dataset_name", "criteo_1tb", "--input", str(sample), "--output", str(data)]
    assert main(command) == 0
    result = _train(data, tmp_path / "run", "--method", "qr", "--compress_rate", "4", "--batch_size", "256")
    assert result["status"] == "completed"
    assert result["num_samples"] == 1000
