"""The run configuration: defaults, flags over file, all problems at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from recemb.errors import ConfigError
from recemb.training.config import RunConfig, load_config, parse_config

MINIMAL = {"data_dir": "data", "output": "out"}


def test_defaults_are_resolved() -> None:
    config = parse_config(MINIMAL)
    assert config.dense_arch_layer_sizes == (512, 256, 16)
    assert config.over_arch_layer_sizes == (512, 512, 256, 1)
    assert (config.optimizer, config.learning_rate, config.eps) == ("adam", 1e-3, 1e-8)
    assert (config.batch_size, config.test_batch_size) == (512, 4096)
    assert (config.method, config.method_threshold, config.shuffle_batches) == ("dense", 200, True)
    assert parse_config(MINIMAL | {"optimizer": "sgd"}).eps is None
    rowwise = parse_config(MINIMAL | {"optimizer": "rowwise_adagrad"})
    assert (rowwise.learning_rate, rowwise.eps) == (1e-2, 1e-8)
    assert parse_config(MINIMAL | {"batch_size": 10_000}).test_batch_size == 10_000


def test_flags_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data_dir: here\noutput: out\nbatch_size: 64\nlearning_rate: 1e-3\nseed: 7\n")
    config = load_config({"batch_size": "128", "over_arch_layer_sizes": "8, 1", "overwrite": True}, path)
    assert (config.data_dir, config.batch_size, config.seed) == ("here", 128, 7)
    assert config.learning_rate == 0.001
    assert config.over_arch_layer_sizes == (8, 1)
    assert config.overwrite is True


def test_text_flags_stay_text() -> None:
    config = load_config({"data_dir": "1e3", "output": "2024", "num_embeddings_per_feature": "5"})
    assert (config.data_dir, config.output, config.num_embeddings_per_feature) == ("1e3", "2024", (5,))


def test_resolved_yaml_reads_back_equal(tmp_path: Path) -> None:
    config = parse_config(
        MINIMAL
        | {"method": "robe", "compress_rate": 1e3, "output": "on", "num_embeddings_per_feature": [3, 4]}
    )
    path = tmp_path / "resolved_config.yaml"
    path.write_text(config.to_yaml())
    assert load_config({}, path) == config


def test_all_problems_at_once_with_origin_and_suggestion(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "data_dir: x\nbatch_sise: 3\nmethod: robee\nembedding_dim: 3.5\n"
        "shuffle_batches: yes\nover_arch_layer_sizes: [3,\n  x, 1]\nqqqqq: 1\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config({"seed": "abc", "learning_rate": "-1"}, path)
    lines = str(caught.value).split("\n  ")
    assert lines[0] == "9 problems in the run configuration:"
    assert set(lines[1:]) == {
        "--output: is required",
        f"{path}:2: batch_sise: unknown key; did you mean batch_size?",
        f"{path}:3: method: 'robee' is not one of them; did you mean robe?",
        f"{path}:4: embedding_dim: should be a valid integer, not 3.5",
        f"{path}:5: shuffle_batches: should be a valid boolean, not 'yes'",
        f"{path}:7: over_arch_layer_sizes[1]: should be a valid integer, not 'x'",
        f"{path}:8: qqqqq: unknown key; see recemb train --help",
        "--seed: should be a valid integer, not 'abc'",
        "--learning_rate: should be greater than 0, not -1",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding_dim": 8, "dense_arch_layer_sizes": [4, 16]}, "end it with 8, e.g. 4,8"),
        ({"over_arch_layer_sizes": [4, 2]}, "the last one 1"),
        ({"over_arch_layer_sizes": [1]}, "two sizes or more"),
        ({"over_arch_layer_sizes": []}, "over_arch_layer_sizes"),
        ({"method": "tt"}, "compress_rate: method tt needs it"),
        ({"compress_rate": 10.0}, "compress_rate: method is dense"),
        ({"compare": "dense"}, "compare: the run is dense already"),
        ({"num_embeddings": 5, "num_embeddings_per_feature": [3]}, "keep one of them"),
        ({"optimizer": "sgd", "eps": 1e-8}, "sgd has no eps"),
        ({"method": "tt", "compress_rate": 0.5}, "compress_rate: should be greater than or equal to 1"),
        ({"method": "tt", "compress_rate": float("inf")}, "compress_rate: should be a finite number"),
        ({"batch_size": 0}, "batch_size: should be greater than 0"),
        ({"seed": 2**63}, "seed: should be less than"),
        ({"interaction_type": "projection"}, "choose from original, dcn"),
        ({"dataset_name": "criteo_kagle"}, "did you mean criteo_kaggle"),
        ({"batch_size": True}, "batch_size: should be a valid integer, not True"),
        ({"dense_arch_layer_sizes": "8,,16"}, re.escape("dense_arch_layer_sizes[1]")),
        ({"data_dir": ""}, "data_dir: .*at least 1 character"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(MINIMAL | change)


def test_cross_field_problems_come_together() -> None:
    with pytest.raises(ConfigError, match="2 problems") as caught:
        parse_config(MINIMAL | {"method": "qr", "over_arch_layer_sizes": [3]})
    assert "compress_rate" in str(caught.value)
    assert "over_arch_layer_sizes" in str(caught.value)


def test_dense_twin_differs_in_compression_alone() -> None:
    config = parse_config(
        MINIMAL | {"method": "tt", "compress_rate": 50, "compare": "dense", "seed": 4, "optimizer": "sgd"}
    )
    twin = config.dense_twin()
    changed = {name for name in RunConfig.model_fields if getattr(config, name) != getattr(twin, name)}
    assert changed == {"method", "compress_rate", "compare"}
    assert twin.method == "dense"
