"""The engine: groups by method, columns in the order asked for, checks before anything is computed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.backends import BACKENDS, backend_of
from recemb.bags import Bags
from recemb.engine import Engine
from recemb.errors import BatchError
from recemb.spec import ROBE, Compression, Dense, MixedDimension, QuotientRemainder, TableSpec, TensorTrain
from tests.backends.cases import build_tables, gradients, make_bags, naive_pooled

METHODS: list[Compression] = [
    Dense(),
    TensorTrain(rank=2),
    TensorTrain(rank=(3, 1)),
    QuotientRemainder(collisions=3),
    QuotientRemainder(collisions=2, operation="concat"),
    ROBE(compress_rate=1.5, block_size=2),
    MixedDimension(dim=2),
]


def test_every_backend_is_drawn() -> None:
    tables = [TableSpec(name="t", num_embeddings=9, embedding_dim=4, compression=c) for c in METHODS]
    assert {backend_of(spec) for spec in tables} == set(BACKENDS)


@st.composite
def models(draw: st.DrawFn) -> list[TableSpec]:
    """Tables of any methods in any order, with one to three features each, some shared between tables."""
    return [
        TableSpec(
            name=f"t{k}",
            num_embeddings=draw(st.integers(4, 30)),
            embedding_dim=draw(st.integers(2, 7)),
            feature_names=tuple(draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True))),
            pooling=draw(st.sampled_from(["sum", "mean"])),
            compression=draw(st.sampled_from(METHODS)),
            init_std=0.5,
        )
        for k in range(draw(st.integers(1, 6)))
    ]


@given(models(), st.integers(0, 5), st.integers(0, 99))
@settings(derandomize=True, deadline=None, max_examples=80)
def test_the_engine_pools_every_feature_in_its_table(tables: list[TableSpec], size: int, seed: int) -> None:
    built = build_tables(tables).double()
    lookups = [spec for spec in tables for _ in spec.feature_names]
    engine = Engine(tables)
    assert [target.table for target in engine.targets] == [spec.name for spec in lookups]
    assert [target.feature for target in engine.targets] == [f for spec in tables for f in spec.feature_names]
    assert engine.dims == tuple(spec.embedding_dim for spec in lookups)
    bags = make_bags(lookups, size, weighted=False, seed=seed)
    got = engine(built, bags)
    want = naive_pooled([built.backend(spec.name) for spec in lookups], bags)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    inputs = list(built.parameters())
    for a, b in zip(gradients(got, inputs), gradients(want + 0 * engine(built, bags), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_f8_nothing_is_computed_for_a_bad_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [
        TableSpec(name=f"t{k}", num_embeddings=9, embedding_dim=4, compression=c)
        for k, c in enumerate(METHODS)
    ]
    built = build_tables(tables)

    def computed(*_: object) -> None:
        raise AssertionError("a lookup began before the batch was checked")

    for backend in BACKENDS:
        monkeypatch.setattr(backend, "pooled", computed)
    ids = torch.arange(7)
    ids[6] = 9
    with pytest.raises(BatchError, match=r"table 't6'.*id 9 is outside \[0, 9\)"):
        Engine(tables)(built, Bags(ids, torch.arange(8), 7))
