"""Tables of half types keep the error law where products round to TF32, which the interpreter has none of."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from recemb_kernels.tt_gather import TrainShape
from tests.kernels.triton.harness import DTYPES, assert_near, make_batch
from tests.kernels.triton.products import as_tf32, dot_of
from tests.kernels.triton.test_tt_gather import _tables

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has TF32")

# Computed shares and stored ones, and products over many ranks.
SHAPES = (
    TrainShape((5, 4, 3), (2, 2, 4), (1, 32, 32, 1)),
    TrainShape((5, 4, 3), (1, 1, 16), (1, 32, 32, 1)),
    TrainShape((9, 8), (8, 8), (1, 64, 1)),
)


@pytest.mark.parametrize(
    ("dtype", "nearest"), [(torch.float32, True), *product(DTYPES[1:], (True, False))], ids=str
)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape.dim_shape)))
def test_products_keep_the_error_law(
    shape: TrainShape, dtype: torch.dtype, nearest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float32 tables, whose law allows no TF32, never ask for it."""
    asked = set()

    def read(operand: Any, precision: str) -> Any:
        asked.add(precision)
        return as_tf32(operand, nearest) if precision == "TF32" else operand

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot_of(read))
    tables = _tables([shape])
    assert_near(tables, make_batch(tables, 5, 3, weighted=True), dtype)
    assert asked == {"IEEE" if dtype is torch.float32 else "TF32"}
