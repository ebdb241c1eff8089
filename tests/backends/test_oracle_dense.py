"""The uncompressed table against torch's own ``nn.EmbeddingBag``, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from recemb.spec import Dense
from tests.backends.cases import bags_of, build_tables, gradients, table


@given(st.data(), st.integers(1, 20), st.integers(1, 9), st.sampled_from(["sum", "mean"]))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_bits_of_embedding_bag(data: st.DataObject, rows: int, dim: int, pooling: str) -> None:
    lengths = data.draw(st.lists(st.integers(0, 4), max_size=6))
    ids = data.draw(st.lists(st.integers(0, rows - 1), min_size=sum(lengths), max_size=sum(lengths)))
    spec = table(rows, dim, Dense(), pooling="mean" if pooling == "mean" else "sum")
    tables = build_tables([spec])
    backend = tables.backend("t")
    bags = bags_of(ids, lengths, 1)
    plain = nn.EmbeddingBag(rows, dim, mode=pooling, include_last_offset=True)
    with torch.no_grad():
        plain.weight.copy_(backend.own_parameters()["weight"])
    got, want = type(backend).pooled([backend], bags), plain(bags.ids, bags.offsets)
    assert torch.equal(got, want)
    for a, b in zip(gradients(got, list(tables.parameters())), gradients(want, [plain.weight]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("row", [0, 1, 6])
def test_a_row_is_a_row_of_the_weight(row: int) -> None:
    backend = build_tables([table(7, 3, Dense())]).backend("t")
    weight = backend.own_parameters()["weight"].tolist()
    assert backend.rows(backend.map_ids(torch.tensor([row])))[0].tolist() == weight[row]
