"""A mixed-dimension row in plain Python (arXiv 1909.11810): row[j] = sum_k E[i][k] P[k][j]."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.engine import Engine
from recemb.spec import MixedDimension
from tests.backends.cases import bags_of, build_tables, table


@given(st.data(), st.integers(1, 60), st.integers(1, 9))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_rows(data: st.DataObject, number: int, dim: int) -> None:
    narrow = data.draw(st.integers(1, dim))
    ids = [*data.draw(st.lists(st.integers(0, number - 1), min_size=1, max_size=8)), 0, number - 1]
    spec = table(number, dim, MixedDimension(dim=narrow))
    tables = build_tables([spec]).double()
    backend = tables.backend("t")
    e, p = (backend.own_parameters()[name].tolist() for name in ("e", "p"))
    assert (len(e), len(e[0]), len(p), len(p[0])) == (number, narrow, narrow, dim)
    expected = torch.tensor(
        [[sum(e[i][k] * p[k][j] for k in range(narrow)) for j in range(dim)] for i in ids],
        dtype=torch.float64,
    )
    slots = backend.map_ids(torch.tensor(ids))
    assert slots.tolist() == [[i] for i in ids]
    torch.testing.assert_close(backend.rows(slots), expected, rtol=1e-12, atol=1e-13)
    looked_up = Engine([spec])(tables, bags_of(ids, [1] * len(ids), 1))
    torch.testing.assert_close(looked_up, expected, rtol=1e-12, atol=1e-13)
