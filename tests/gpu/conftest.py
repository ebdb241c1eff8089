"""What the tests on a GPU watch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.triton import graph_scripts


@pytest.fixture
def brought() -> Iterator[list[bool]]:
    """Of each batch that a graph beside plans for a look-up: whether that had been done ahead."""
    with graph_scripts.brought() as seen:
        yield seen
