"""What the tests on a GPU watch, and what stands in for one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gpu.device import IS_REAL
from tests.kernels.triton import graph_scripts
from tests.kernels.triton.fake_gpu import on_gpu
from tests.kernels.triton.interpreting import products_in_order, without_idle_work

__all__ = ["brought", "on_device", "products_in_order", "without_idle_work"]


@pytest.fixture(autouse=True)
def on_device(products_in_order: None, without_idle_work: None) -> Iterator[None]:
    """Where there is no GPU, each test has a stand-in of its own."""
    if IS_REAL:
        yield
        return
    with on_gpu():
        yield


@pytest.fixture
def brought() -> Iterator[list[bool]]:
    """Of each batch that a graph beside plans for a look-up: whether that had been done ahead."""
    with graph_scripts.brought() as seen:
        yield seen
