"""A cache in ``recemb train``: flags, figures, and weights that are saved with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model

from recemb.cache.metrics import total
from recemb.data.synthetic import write_synthetic
from recemb.errors import ConfigError
from recemb.training.config import RunConfig, parse_config
from recemb.training.report import load_runs, summarise
from recemb.training.run import train
from recemb.training.setup import build_model, choose_tables, open_log
from recemb.training.state import _cache_metrics
from recemb.training.table_step import find_collection

Make = Callable[..., RunConfig]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A small run with a cache on a small log."""
    write_synthetic(tmp_path / "log", 4000, "1/2000", seed=3, val_fraction="0.1", test_fraction="0.1")

    def build(**changes: object) -> RunConfig:
        small: dict[str, object] = {
            "data_dir": str(tmp_path / "log"),
            "output": str(tmp_path / "run"),
            "batch_size": 100,
            "embedding_dim": 4,
            "dense_arch_layer_sizes": "8,4",
            "over_arch_layer_sizes": "8,1",
            "validation_freq_within_epoch": 10,
            "method": "tt",
            "compress_rate": 4.0,
            "cache_fraction": 0.05,
            "cache_policy": "importance",
            "cache_refresh_every": 3,
        }
        return parse_config(small | changes)

    return build


def test_figures_of_older_checkpoints_are_weighed_by_evictions() -> None:
    """Which do not say what the rows that left had learned."""
    figures = {"rows": 9, "cached_rows": 9, "lookups": 0, "hit_rate": 0.0, "promotions": 9}
    older = [
        _cache_metrics({**figures, "evictions": evictions, "write_back_error": error})
        for evictions, error in ((30, 0.5), (10, 0.1), (0, 0.0))
    ]
    assert total(older).write_back_error == pytest.approx(((30 * 0.5**2 + 10 * 0.1**2) / 40) ** 0.5)
    assert _cache_metrics(asdict(older[0])) == older[0]


@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adagrad"])
def test_a_run_reports_its_cache_and_saves_it(make: Make, optimizer: str) -> None:
    config = make(optimizer=optimizer)
    (path,) = train(config)
    result = json.loads((path / "result.json").read_text())
    assert 0 < result["cache_hit_rate"] < 1
    assert result["cache_evictions"] > 0
    assert 0 <= result["cache_write_back_error"] <= 1
    assert result["cache_cached_rows"] <= result["cache_rows"]
    assert result["caches"].keys() <= {table["table"] for table in result["tables"]}
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert all({"cache_hit_rate", "cache_evictions"} <= line.keys() for line in lines)
    log = open_log(config)
    tables = choose_tables(config, log)
    assert result["embedding_bytes"] == tables.memory.total.num_bytes
    assert result["compression_ratio"] == pytest.approx(4, rel=0.06)
    model = build_model(config, log, tables)
    load_model(model, str(path / "checkpoints" / "model.safetensors"))
    caches = find_collection(model)[1].hot_row_caches()
    assert caches
    for name, cache in caches.items():
        assert result["caches"][name]["cached_rows"] == int((cache.ids >= 0).sum())
        assert bool(torch.isfinite(cache.weight).all())


def test_equal_seeds_give_equal_runs(make: Make) -> None:
    aucs = []
    for _ in range(2):
        (path,) = train(make(overwrite=True))
        aucs.append(json.loads((path / "result.json").read_text())["auc"])
    assert aucs[0] == aucs[1]


def test_a_cached_run_is_compared_with_its_dense_twin(make: Make) -> None:
    paths = train(make(compare="dense"))
    dense, cached = summarise(load_runs(paths))
    assert (dense.method, cached.method) == ("dense", "tt")
    assert "cache 0.05 importance" in cached.name
    assert cached.auc_loss is not None
    assert cached.auc_loss.count == 1
    assert "cache_hit_rate" not in json.loads((paths[1] / "result.json").read_text())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "dense", "compress_rate": None}, "--cache_fraction: method is dense"),
        ({"cache_fraction": None}, "--cache_policy: there is no cache; give --cache_fraction"),
        ({"cache_fraction": 2.0}, "--cache_fraction"),
        ({"cache_policy": "lfo"}, "did you mean lfu"),
        ({"cache_refresh_every": 0}, "--cache_refresh_every"),
    ],
)
def test_flags_that_do_not_fit(make: Make, changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make(**changes)
