"""``mixed_dimensions``: d_i = lambda * n_i**(-alpha) (Ginart et al., arXiv 1909.11810)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torchrec
from hypothesis import given, settings
from hypothesis import strategies as st

import recemb
from recemb.errors import ConfigError


def configs(rows: list[int], dim: int = 16, **more: Any) -> list[recemb.EmbeddingBagConfig]:
    return [
        recemb.EmbeddingBagConfig(
            name=f"t{k}", num_embeddings=n, embedding_dim=dim, feature_names=[f"f{k}"], **more
        )
        for k, n in enumerate(rows)
    ]


def dims(tables: list[recemb.EmbeddingBagConfig]) -> list[int]:
    return [
        t.compression.dim if isinstance(t.compression, recemb.MixedDimension) else t.embedding_dim
        for t in tables
    ]


@given(
    st.lists(st.integers(1, 10**8), min_size=1, max_size=8),
    st.sampled_from([1, 2, 7, 16, 64, 128]),
    st.floats(0, 1),
    st.booleans(),
)
@settings(derandomize=True, deadline=None, max_examples=100)
def test_formula(rows: list[int], dim: int, temperature: float, round_dims: bool) -> None:
    got = dims(recemb.mixed_dimensions(configs(rows, dim), temperature, round_dims=round_dims))
    scale = dim * min(rows) ** temperature
    for n, d in zip(rows, got, strict=True):
        exact = scale * n**-temperature
        assert type(d) is int
        assert 1 <= d <= dim
        if round_dims and d not in (1, dim):
            assert d & (d - 1) == 0
            # The nearest power of two: a factor of at most sqrt(2) away.
            assert d / 2**0.5 * (1 - 1e-9) <= exact <= d * 2**0.5 * (1 + 1e-9)
        elif round_dims and d == 1:
            assert exact <= 2**0.5 * (1 + 1e-9)
        elif round_dims:
            # Rounded up to a power of two at or above D.
            assert exact >= dim / 2**0.5 * (1 - 1e-9)
        else:
            assert abs(exact - d) <= 0.5 + 1e-9 * dim or (d == 1 and exact < 1)
    assert all(
        a >= b for (m, a) in zip(rows, got, strict=True) for (n, b) in zip(rows, got, strict=True) if m <= n
    )


def test_dlrms_default_on_kaggle_sizes() -> None:
    tables = recemb.mixed_dimensions(configs([3, 305, 12_517, 10_131_227]))
    assert dims(tables) == [16, 4, 1, 1]
    assert [16 * (n / 3) ** -0.3 for n in (305, 12_517, 10_131_227)] == pytest.approx(
        [4.00, 1.311, 0.176], rel=0.01
    )


def test_the_full_dimension_stays_uncompressed_and_other_fields_are_kept() -> None:
    given_tables = configs([10, 10_000], weight_init_max=0.5)
    before = repr(given_tables)
    tables = recemb.mixed_dimensions(given_tables)
    assert isinstance(tables[0].compression, recemb.Dense)
    assert isinstance(tables[1].compression, recemb.MixedDimension)
    assert [t.name for t in tables] == ["t0", "t1"]
    assert [t.feature_names for t in tables] == [["f0"], ["f1"]]
    assert all(t.weight_init_max == 0.5 for t in tables)
    assert repr(given_tables) == before


def test_zero_temperature_keeps_every_dimension() -> None:
    assert dims(recemb.mixed_dimensions(configs([3, 10**7], 7), 0.0)) == [7, 7]


def test_plain_torchrec_configs_are_taken() -> None:
    plain = [
        torchrec.EmbeddingBagConfig(
            name="t", num_embeddings=n, embedding_dim=8, feature_names=["f"], need_pos=True
        )
        for n in (10, 10_000)
    ]
    tables = recemb.mixed_dimensions(plain)
    assert all(isinstance(t, recemb.EmbeddingBagConfig) and t.need_pos for t in tables)
    assert dims(tables) == [8, 1]


def test_no_tables() -> None:
    assert recemb.mixed_dimensions([]) == []


@pytest.mark.parametrize("temperature", [-0.1, 1.5, math.nan, math.inf])
def test_f15_temperature_out_of_range(temperature: float) -> None:
    with pytest.raises(ConfigError, match=r"temperature=.*\[0, 1\], e\.g\. 0\.3"):
        recemb.mixed_dimensions(configs([10]), temperature)
