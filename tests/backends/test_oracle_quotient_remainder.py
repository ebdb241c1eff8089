"""A quotient-remainder row in plain Python (arXiv 1909.02107): E_q[i // c] o E_r[i mod c]."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.engine import Engine
from recemb.spec import QuotientRemainder, TableSpec
from tests.backends.cases import bags_of, build_tables, table

Operation = Literal["mult", "add", "concat"]
OPERATIONS: list[Operation] = ["mult", "add", "concat"]
FAR = [2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**31 + 1, 2**33 - 1]


def oracle_row(q: list[float], r: list[float], operation: Operation) -> list[float]:
    if operation == "concat":
        return q + r
    if operation == "add":
        return [a + b for a, b in zip(q, r, strict=True)]
    return [a * b for a, b in zip(q, r, strict=True)]


def check_rows(spec: TableSpec, ids: list[int]) -> None:
    compression = spec.compression
    assert isinstance(compression, QuotientRemainder)
    tables = build_tables([spec]).double()
    backend = tables.backend(spec.name)
    q, r = backend.own_parameters()["q"], backend.own_parameters()["r"]
    c = compression.collisions
    assert q.shape[0] == math.ceil(spec.num_embeddings / c)
    assert r.shape[0] == c
    if compression.operation == "concat":
        assert (q.shape[1], r.shape[1]) == (spec.embedding_dim // 2, -(-spec.embedding_dim // 2))
    expected = torch.tensor(
        [oracle_row(q[i // c].tolist(), r[i % c].tolist(), compression.operation) for i in ids],
        dtype=torch.float64,
    )
    slots = backend.map_ids(torch.tensor(ids))
    assert slots.tolist() == [[i // c, i % c] for i in ids]
    assert torch.equal(backend.rows(slots), expected)
    looked_up = Engine([spec])(tables, bags_of(ids, [1] * len(ids), 1))
    assert torch.equal(looked_up, expected)


@given(st.data(), st.integers(1, 300), st.integers(2, 9), st.sampled_from(OPERATIONS))
@settings(derandomize=True, deadline=None, max_examples=80)
def test_rows(data: st.DataObject, number: int, dim: int, operation: Operation) -> None:
    collisions = data.draw(st.integers(1, number))
    ids = data.draw(st.lists(st.integers(0, number - 1), min_size=1, max_size=8))
    spec = table(number, dim, QuotientRemainder(collisions=collisions, operation=operation))
    check_rows(spec, [*ids, 0, number - 1])


@given(st.integers(1, 300), st.data())
@settings(derandomize=True, deadline=None, max_examples=30)
def test_partitions_are_complementary(number: int, data: st.DataObject) -> None:
    collisions = data.draw(st.integers(1, number))
    spec = table(number, 2, QuotientRemainder(collisions=collisions))
    slots = build_tables([spec]).backend("t").map_ids(torch.arange(number))
    assert len({tuple(pair) for pair in slots.tolist()}) == number


@pytest.mark.parametrize("operation", OPERATIONS)
@given(ids=st.lists(st.integers(0, 2**33 - 1), max_size=4), offset=st.integers(-3, 3))
@settings(derandomize=True, deadline=None, max_examples=4)
def test_f5_ids_beyond_float32_and_int32(operation: Operation, ids: list[int], offset: int) -> None:
    collisions = math.isqrt(2**33) + offset
    check_rows(table(2**33, 2, QuotientRemainder(collisions=collisions, operation=operation)), [*ids, *FAR])


def test_f5_quotients_that_float32_division_gets_wrong() -> None:
    number, c = 17_800_000, 4219
    ids = torch.arange(number - 200_000, number)
    wrong = (ids.float() / c).floor().long() != ids // c
    assert int(wrong.sum()) > 0, "the ids below no longer tell integer from float division"
    check_rows(table(number, 2, QuotientRemainder(collisions=c)), ids[wrong][:50].tolist())


def test_f14_two_to_the_33_rows_of_64() -> None:
    spec = table(2**33, 64, QuotientRemainder(collisions=math.isqrt(2**33)))
    check_rows(spec, [0, 1, 2**33 - 2, *FAR])


def test_rows_are_combined_before_pooling() -> None:
    """dlrm#366 pools both sides first: (q1 + q2) * (r1 + r2) is not q1 * r1 + q2 * r2."""
    spec = table(4, 2, QuotientRemainder(collisions=2))
    tables = build_tables([spec])
    with torch.no_grad():
        tables.backend("t").own_parameters()["q"].copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tables.backend("t").own_parameters()["r"].copy_(torch.tensor([[5.0, 6.0], [7.0, 8.0]]))
    pooled = Engine([spec])(tables, bags_of([0, 3], [2], 1))
    assert pooled.tolist() == [[1 * 5 + 3 * 7, 2 * 6 + 4 * 8]]
