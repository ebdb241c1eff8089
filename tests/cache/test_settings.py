"""What :class:`recemb.HotRows` refuses, and where it can be given."""

from __future__ import annotations

from typing import Any

import pytest

from recemb import ROBE, Dense, HotRows, TensorTrain
from recemb.backends import backend_of
from recemb.backends.memory import cache_bytes, memory_report
from recemb.errors import ConfigError
from recemb.planner.budget import compress
from recemb.spec import TableSpec
from tests.cache.cases import METHODS, spec


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, r"neither fraction nor rows is given.*HotRows\(fraction=0.01\)"),
        ({"fraction": 0.1, "rows": 3}, r"both fraction=0.1 and rows=3"),
        ({"fraction": 0.0}, r"fraction=0.0 must be a number in \(0, 1\]"),
        ({"fraction": 1.5}, r"fraction=1.5"),
        ({"fraction": float("nan")}, r"fraction=nan"),
        ({"fraction": True}, r"fraction=True"),
        ({"rows": 0}, r"rows=0 must be an int >= 1"),
        ({"rows": 2.0}, r"rows=2.0"),
        ({"rows": 1, "policy": "fifo"}, r"policy='fifo' must be one of lfu, lru, importance"),
        ({"rows": 1, "refresh_every": 0}, r"refresh_every=0 must be an int >= 1"),
        ({"rows": 1, "warmup": -1}, r"warmup=-1 must be an int >= 0"),
        ({"rows": 1, "track_every": 0}, r"track_every=0"),
        ({"rows": 1, "decay": 0}, r"decay=0 must be a number in \(0, 1\]"),
        ({"rows": 1, "decay": 1.1}, r"decay=1.1"),
        ({"rows": 1, "write_back": 1}, r"write_back=1 must be True or False"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        HotRows(**settings)


def test_only_a_compression_has_a_cache() -> None:
    with pytest.raises(ConfigError, match=r"Dense: cache=.*uncompressed already"):
        Dense(cache=HotRows(rows=1))
    with pytest.raises(ConfigError, match=r"TensorTrain: cache=0.01 must be HotRows"):
        TensorTrain(rank=4, cache=0.01)  # type: ignore[arg-type]


def test_capacity_is_between_one_row_and_all() -> None:
    assert HotRows(fraction=0.001).capacity(10) == 1
    assert HotRows(fraction=0.01).capacity(1000) == 10
    assert HotRows(fraction=1).capacity(7) == 7
    assert HotRows(rows=100).capacity(7) == 7
    assert spec(TensorTrain(rank=2, cache=HotRows(rows=100)), 60).cache_rows == 60
    assert spec(TensorTrain(rank=2), 60).cache_rows == 0


def test_the_first_exchange_waits_for_some_counts() -> None:
    assert HotRows(rows=1, refresh_every=10).first_refresh == 10
    assert HotRows(rows=1, refresh_every=1000).first_refresh == 64
    assert HotRows(rows=1, warmup=0).first_refresh == 0


def test_tables_of_one_robe_array_may_differ_in_cache_only() -> None:
    one = spec(ROBE(compress_rate=4, block_size=8, cache=HotRows(rows=3)), name="a")
    two = spec(ROBE(compress_rate=4, block_size=8), name="b")
    other = spec(ROBE(compress_rate=4, block_size=4), name="b")
    kind = backend_of(one)
    assert kind.storage_key(one) == kind.storage_key(two)
    assert kind.num_params([one, two]) == 30 * 8 + 3 * 8
    with pytest.raises(ConfigError, match="share the ROBE array"):
        kind.param_shapes([one, other])


@pytest.mark.parametrize("method", METHODS)
def test_equal_compressions_stay_equal(method: str) -> None:
    make = METHODS[method]
    assert make(None) == make(None)
    assert make(HotRows(rows=3)) == make(HotRows(rows=3))
    assert make(HotRows(rows=3)) != make(None)
    assert hash(make(HotRows(rows=3))) == hash(make(HotRows(rows=3)))


@pytest.mark.parametrize("method", ["tt", "qr", "robe", "md"])
@pytest.mark.parametrize("rate", [5.0, 20.0])
def test_a_budget_holds_the_cache_too(method: str, rate: float) -> None:
    tables = [
        TableSpec(name=f"t{rows}", num_embeddings=rows, embedding_dim=16)
        for rows in (50, 3000, 40_000, 90_000)
    ]
    cache = HotRows(fraction=0.005)
    chosen = compress(tables, method, rate, cache=cache)
    if method == "md" and rate == 20.0:
        assert chosen.shortfall is not None
        assert "caches are" in chosen.shortfall
        return
    assert chosen.shortfall is None
    assert chosen.memory.total.ratio == pytest.approx(rate, rel=0.05)
    large = [table for table in chosen.tables if table.num_embeddings > 200]
    assert any(table.compression.cache == cache for table in large)
    for table in chosen.tables:
        assert table.compression.cache in ((cache, None) if table in large else (None,))
    assert sum(map(cache_bytes, chosen.tables)) > 0.03 * memory_report(chosen.tables).total.num_bytes


def test_a_cache_beyond_the_budget_is_named() -> None:
    tables = [TableSpec(name="t", num_embeddings=100_000, embedding_dim=16)]
    chosen = compress(tables, "tt", 100.0, cache=HotRows(fraction=0.02))
    assert chosen.shortfall is not None
    assert "lower the cache's fraction" in chosen.shortfall
    with pytest.raises(ConfigError, match="nothing to cache"):
        compress(tables, "dense", 1.0, cache=HotRows(fraction=0.02))
