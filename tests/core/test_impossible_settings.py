"""F15: every impossible setting is refused when it is written down, with the value and a way out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.modules.embedding_configs import DataType, PoolingType

import recemb
from recemb.backends import build
from recemb.errors import ConfigError
from recemb.spec import Compression, TableSpec


def spec(rows: Any = 100, dim: Any = 8, name: Any = "t", **more: Any) -> TableSpec:
    return TableSpec(name=name, num_embeddings=rows, embedding_dim=dim, **more)


def built(*tables: TableSpec) -> None:
    build(tables, torch.device("meta"))


def refused(make: Callable[[], object], *parts: str) -> str:
    with pytest.raises(ConfigError) as caught:
        make()
    message = str(caught.value)
    for part in parts:
        assert re.search(part, message), message
    assert caught.value.exit_code == 2
    return message


NOT_INTS = [0, -1, 2.0, "2", None, True, math.nan]


@pytest.mark.parametrize("value", NOT_INTS, ids=repr)
@pytest.mark.parametrize(
    ("make", "field", "hint"),
    [
        (lambda v: recemb.TensorTrain(rank=v), "rank", "e.g. rank=16"),
        (lambda v: recemb.TensorTrain(rank=(2, v)), "rank", "e.g. rank=16"),
        (lambda v: recemb.TensorTrain(rank=2, num_cores=v), "num_cores", ">= 2, e.g. 3"),
        (lambda v: recemb.QuotientRemainder(collisions=v), "collisions", "e.g. 4"),
        (lambda v: recemb.ROBE(compress_rate=2, block_size=v), "block_size", "e.g. 16"),
        (lambda v: recemb.MixedDimension(dim=v), "dim", "e.g. 4"),
        (lambda v: spec(rows=v), "num_embeddings", ">= 1"),
        (lambda v: spec(dim=v), "embedding_dim", ">= 1"),
    ],
    ids=["tt-rank", "tt-ranks", "tt-cores", "qr-collisions", "robe-block", "md-dim", "rows", "dim"],
)
def test_f15_ints_that_are_none(make: Callable[[Any], object], field: str, hint: str, value: Any) -> None:
    refused(lambda: make(value), field, re.escape(repr(value)), re.escape(hint))


@pytest.mark.parametrize("value", [0, 0.5, -3, math.nan, math.inf, "100", True, None], ids=repr)
def test_f15_robe_compress_rate(value: Any) -> None:
    refused(lambda: recemb.ROBE(compress_rate=value, block_size=4), "compress_rate", "number >= 1, e.g. 100")


@pytest.mark.parametrize("value", [-1, 2**63, 1.0, None, True], ids=repr)
def test_f15_robe_seed(value: Any) -> None:
    refused(lambda: recemb.ROBE(compress_rate=2, block_size=4, seed=value), "seed", r"\[0, 2\*\*63\)")


def test_f15_robe_group_without_a_name() -> None:
    refused(lambda: recemb.ROBE(compress_rate=2, block_size=4, group=""), "group", "group='robe'")


@pytest.mark.parametrize("value", [5, None, b"robe"], ids=repr)
def test_f15_robe_group_that_is_no_name(value: Any) -> None:
    make = lambda: recemb.ROBE(compress_rate=2, block_size=4, group=value)  # noqa: E731
    refused(make, re.escape(f"group={value!r} must be a str"), "group='robe'")


@pytest.mark.parametrize("value", ["False", 0, 1, None], ids=repr)
def test_f15_robe_use_sign(value: Any) -> None:
    make = lambda: recemb.ROBE(compress_rate=2, block_size=4, use_sign=value)  # noqa: E731
    refused(make, re.escape(f"use_sign={value!r} must be True or False"))


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_numpys_numbers_are_stored_as_pythons(integer: Any) -> None:
    four = integer(4)
    made = [
        (recemb.TensorTrain(rank=four, num_cores=four), recemb.TensorTrain(rank=4, num_cores=4)),
        (
            recemb.TensorTrain(rank=(four, four), row_shape=[four] * 3, dim_shape=(2, four, 1)),
            recemb.TensorTrain(rank=(4, 4), row_shape=(4, 4, 4), dim_shape=(2, 4, 1)),
        ),
        (recemb.QuotientRemainder(collisions=four), recemb.QuotientRemainder(collisions=4)),
        (recemb.MixedDimension(dim=four), recemb.MixedDimension(dim=4)),
        (
            recemb.ROBE(compress_rate=np.float32(4.5), block_size=four, seed=four),
            recemb.ROBE(compress_rate=4.5, block_size=4, seed=4),
        ),
        (
            recemb.HotRows(rows=four, refresh_every=four, warmup=four, track_every=four),
            recemb.HotRows(rows=4, refresh_every=4, warmup=4, track_every=4),
        ),
        (
            recemb.HotRows(fraction=np.float32(0.25), decay=np.float64(0.5)),
            recemb.HotRows(fraction=0.25, decay=0.5),
        ),
    ]
    for ours, expected in made:
        # What numpy's numbers print as differs.
        assert repr(ours) == repr(expected)
    refused(lambda: recemb.TensorTrain(rank=np.float32(4)), "rank=4.0 must be ints")
    refused(lambda: recemb.HotRows(rows=np.bool_(True)), "rows=.*must be an int")


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"rank": (2, 3, 4)}, ["3 bonds", "3 cores have 2", "one int or 2"]),
        ({"rank": ()}, ["0 bonds"]),
        ({"rank": 2, "num_cores": 1}, ["num_cores=1"]),
        ({"rank": 2, "row_shape": (10, 10)}, ["row_shape", "2 factors", "num_cores=2"]),
        ({"rank": 2, "dim_shape": (2, 2, 2, 1)}, ["dim_shape", "4 factors", "num_cores=4"]),
        ({"rank": 2, "row_shape": (10, 0, 10)}, ["row_shape", "ints >= 1"]),
        ({"rank": 2, "row_shape": (10, 2.5, 10)}, ["row_shape", "ints >= 1"]),
        ({"rank": 2, "dim_shape": (2, True, 4)}, ["dim_shape", "ints >= 1"]),
        ({"rank": 2, "row_shape": 100}, ["row_shape=100"]),
        ({"rank": 2, "dim_shape": 8}, ["dim_shape=8"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_f15_tensor_train_shapes(more: dict[str, Any], parts: list[str]) -> None:
    refused(lambda: recemb.TensorTrain(**more), *parts)


@given(st.integers(2, 10**6), st.integers(1, 50), st.integers(1, 50), st.integers(1, 50))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_f15_tensor_train_too_few_rows_and_the_suggestion_works(rows: int, a: int, b: int, c: int) -> None:
    if a * b * c >= rows:
        return
    make = lambda shape: spec(rows, 8, compression=recemb.TensorTrain(rank=2, row_shape=shape))  # noqa: E731
    message = refused(
        lambda: make((a, b, c)), "table 't'", f"holds {a * b * c} rows", f"num_embeddings={rows}"
    )
    suggestion = re.search(r"e\.g\. row_shape=\((\d+), (\d+), (\d+)\)", message)
    assert suggestion
    built(make(tuple(map(int, suggestion.groups()))))


def test_f15_tensor_train_dim_shape_of_another_dim() -> None:
    refused(
        lambda: spec(100, 8, compression=recemb.TensorTrain(rank=2, dim_shape=(2, 2, 4))),
        "table 't'",
        "multiplies to 16",
        "embedding_dim=8",
        "dim_shape=None",
    )


@given(st.integers(1, 10**6), st.integers(1, 10**6))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_f15_qr_collisions_beyond_the_rows_and_the_suggestion_works(rows: int, more: int) -> None:
    make = lambda c: spec(rows, 8, compression=recemb.QuotientRemainder(collisions=c))  # noqa: E731
    message = refused(
        lambda: make(rows + more), "table 't'", f"collisions={rows + more}", f"num_embeddings={rows}"
    )
    suggestion = re.search(r"collisions=(\d+)$", message)
    assert suggestion
    built(make(int(suggestion.group(1))))


def test_f15_qr_operation() -> None:
    for operation in ("multiply", "", None, 3):
        refused(
            lambda: recemb.QuotientRemainder(collisions=2, operation=operation),  # type: ignore[arg-type]  # noqa: B023
            "operation",
            "'mult', 'add' or 'concat'",
        )
    refused(
        lambda: spec(10, 1, compression=recemb.QuotientRemainder(collisions=2, operation="concat")),
        "table 't'",
        "splits embedding_dim",
        "operation='mult'",
    )


def test_f15_mixed_dimension_wider_than_the_table() -> None:
    refused(
        lambda: spec(10, 8, compression=recemb.MixedDimension(dim=9)),
        "table 't'",
        "dim=9",
        "embedding_dim=8",
        "use dim <= 8",
    )


@given(st.integers(1, 60), st.integers(2, 40), st.integers(1, 50), st.floats(1, 1e4))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_f15_robe_array_smaller_than_a_row_and_the_suggestion_works(
    rows: int, dim: int, block_size: int, rate: float
) -> None:
    compression = recemb.ROBE(compress_rate=rate, block_size=block_size)
    table = spec(rows, dim, compression=compression)
    try:
        built(table)
    except ConfigError as error:
        message = str(error)
        assert f"fewer than embedding_dim={dim}" in message
        assert "table 't'" in message
        lower = re.search(r"compress_rate <= ([\d.e+]+) or", message)
        if lower:
            compression = recemb.ROBE(compress_rate=float(lower.group(1)), block_size=block_size)
            built(spec(rows, dim, compression=compression))
        fitting = re.search(r"block_size=(\d+)$", message)
        assert fitting, message
        compression = recemb.ROBE(compress_rate=rate, block_size=int(fitting.group(1)))
        built(spec(rows, dim, compression=compression))


@pytest.mark.parametrize(
    "other",
    [
        recemb.ROBE(compress_rate=3, block_size=4),
        recemb.ROBE(compress_rate=2, block_size=8),
        recemb.ROBE(compress_rate=2, block_size=4, use_sign=True),
        recemb.ROBE(compress_rate=2, block_size=4, seed=1),
    ],
    ids=["rate", "block", "sign", "seed"],
)
def test_f15_robe_group_with_conflicting_settings(other: recemb.ROBE) -> None:
    first = spec(name="a", compression=recemb.ROBE(compress_rate=2, block_size=4))
    refused(lambda: built(first, spec(name="b", compression=other)), "'a'", "'b'", "'robe'", "another group")


def test_f15_robe_group_with_two_dtypes() -> None:
    compression = recemb.ROBE(compress_rate=2, block_size=4)
    tables = [
        spec(name="a", compression=compression),
        spec(name="b", compression=compression, dtype="float16"),
    ]
    refused(lambda: built(*tables), "float32", "float16", "another group")
    other = recemb.ROBE(compress_rate=2, block_size=4, group="half")
    built(tables[0], spec(name="b", compression=other, dtype="float16"))


def test_f15_duplicate_table_names() -> None:
    refused(lambda: built(spec(name="a"), spec(name="b"), spec(name="a")), "duplicate table name 'a'")
    table = recemb.EmbeddingBagConfig(name="a", num_embeddings=5, embedding_dim=2, feature_names=["f"])
    refused(lambda: recemb.EmbeddingBagCollection(tables=[table, table]), "duplicate table name 'a'")


@pytest.mark.parametrize("name", ["items", "keys", "training", "forward", "pop"])
def test_f15_table_names_that_torch_reserves(name: str) -> None:
    table = recemb.EmbeddingBagConfig(name=name, num_embeddings=5, embedding_dim=2, feature_names=["f"])
    refused(lambda: recemb.EmbeddingBagCollection(tables=[table]), f"'{name}' is taken", f"'t_{name}'")


@pytest.mark.parametrize("name", ["", "a.b", "."])
def test_f15_table_names_that_break_state_dict_keys(name: str) -> None:
    refused(lambda: spec(name=name), repr(name), "without '.'")


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"dtype": "float64"}, ["float64", "float32", "bfloat16"]),
        ({"pooling": "max"}, ["'max'", "'sum' or 'mean'"]),
        ({"compression": "tt"}, ["'tt'", r"TensorTrain\(rank=16\)"]),
        ({"compression": None}, ["None"]),
        ({"init_std": math.nan}, ["init_std=nan"]),
        ({"init_std": -0.1}, ["init_std=-0.1", ">= 0"]),
        ({"init_std": math.inf}, ["init_std=inf"]),
        ({"rows": 2**61}, [r"below 2\*\*61"]),
        ({"rows": 2**61 - 1}, ["num_embeddings=2305843009213693951 times", r"below 2\*\*61"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_f15_table_settings(more: dict[str, Any], parts: list[str]) -> None:
    refused(lambda: spec(**more), "table 't'", *parts)


def test_f15_an_unknown_compression_has_no_backend() -> None:
    class Other(Compression):
        """Not in BACKENDS."""

    refused(lambda: built(spec(compression=Other())), "no backend stores", "TensorTrain")


@pytest.mark.parametrize("change", [{"num_embeddings": 0}, {"embedding_dim": 0}, {"embedding_dim": 2.0}])
def test_f15_configs_are_checked_when_written(change: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"name": "t", "num_embeddings": 5, "embedding_dim": 2, "feature_names": ["f"]}
    fields.update(change)
    refused(lambda: recemb.EmbeddingBagConfig(**fields), "table 't'", *change)


def test_f15_weighted_mean_is_refused() -> None:
    table = recemb.EmbeddingBagConfig(
        name="t", num_embeddings=5, embedding_dim=2, feature_names=["f"], pooling=PoolingType.MEAN
    )
    recemb.EmbeddingBagCollection(tables=[table])
    refused(
        lambda: recemb.EmbeddingBagCollection(tables=[table], is_weighted=True),
        "table 't'",
        "MEAN",
        "is_weighted=True",
        "use SUM",
    )


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"data_type": DataType.INT8}, "data_type.*use FP32, FP16 or BF16"),
        ({"pooling": PoolingType.NONE}, "pooling.*use SUM or MEAN"),
        ({"weight_init_min": 1.0, "weight_init_max": -1.0}, "init_std"),
    ],
)
def test_f15_configs_no_backend_honours(more: dict[str, Any], part: str) -> None:
    table = recemb.EmbeddingBagConfig(
        name="t", num_embeddings=5, embedding_dim=2, feature_names=["f"], **more
    )
    refused(lambda: recemb.EmbeddingBagCollection(tables=[table]), "table 't'", part)


def test_f15_an_init_fn_that_draws_nan() -> None:
    table = recemb.EmbeddingBagConfig(
        name="t",
        num_embeddings=50,
        embedding_dim=4,
        feature_names=["f"],
        compression=recemb.TensorTrain(rank=2),
        init_fn=lambda weight: weight.fill_(math.nan),
    )
    refused(lambda: recemb.EmbeddingBagCollection(tables=[table]), "table 't'", "init_fn.*non-finite")
