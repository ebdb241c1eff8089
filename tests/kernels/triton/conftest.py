"""Where there is no GPU every kernel here is interpreted; where there is one, it runs on that."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton.interpreting import products_in_order, without_idle_work

__all__ = ["products_in_order", "without_idle_work"]


def pytest_itemcollected(item: pytest.Item) -> None:
    """On a machine with a GPU, what is proved here runs on it: ``-m gpu`` is to find that too."""
    if torch.cuda.is_available() and not any(mark.args[0] for mark in item.iter_markers("skipif")):
        item.add_marker("gpu")
