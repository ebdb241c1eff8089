"""The dense transform: its formula, and that no int64 makes it infinite (F2)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.data.dense import log_shift


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.booleans()), min_size=1, max_size=20))
def test_f2_finite_for_every_int64(rows: list[tuple[int, bool]]) -> None:
    values = np.array([value for value, _ in rows], np.int64)
    missing = np.array([absent for _, absent in rows])
    result = log_shift(values, missing)
    assert result.dtype == np.float32
    for (value, absent), found in zip(rows, result.tolist(), strict=True):
        expected = 0.0 if absent else math.log(max(value, -2) + 3)
        assert math.isfinite(found)
        assert 0.0 <= found < 43.7
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    "value", [-(2**63), 2**63 - 1, -3, -2, -1, 0, 1, 2**31 - 3, 2**31 - 1, 2**31, -(2**31)]
)
def test_f2_edges(value: int) -> None:
    result = log_shift(np.array([[value]]), np.array([[False]]))
    assert result.shape == (1, 1)
    assert result[0, 0] == np.float32(math.log(max(value, -2) + 3))


def test_missing_differs_from_zero() -> None:
    zero, missing = log_shift(np.array([0, 0]), np.array([False, True]))
    assert (zero, missing) == (np.float32(math.log(3)), 0.0)
