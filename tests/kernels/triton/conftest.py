"""The interpreter adds the products of float32 up as a GPU does, and others no better."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


@pytest.fixture(autouse=True)
def _products_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of matrices is a chain of fused multiply-adds over K, which rounds more than numpy's sums."""

    def create_dot(_: Any, a: Any, b: Any, total: Any, *__: Any) -> Any:
        left, right = a.data.astype(np.float64), b.data.astype(np.float64)
        added = total.data
        for k in range(left.shape[1]):
            added = (left[:, k, None] * right[None, k] + added).astype(np.float32)
        return TensorHandle(added, total.dtype.scalar)

    if not torch.cuda.is_available():
        monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
