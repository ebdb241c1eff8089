"""What the tests on a GPU watch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from recemb_kernels.triton_frame.graphs import GraphedGroup
from tests.kernels.triton import graph_scripts


@pytest.fixture
def groups_made() -> Iterator[list[GraphedGroup]]:
    """The groups of tables whose look-ups may be captured, as they are made in a test."""
    made: list[GraphedGroup] = []
    begin = GraphedGroup.__init__

    def watched(self: GraphedGroup, *args: Any) -> None:
        begin(self, *args)
        made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphedGroup, "__init__", watched)
        yield made


@pytest.fixture
def brought() -> Iterator[list[bool]]:
    """Of each batch that a graph beside plans for a look-up: whether that had been done ahead."""
    with graph_scripts.brought() as seen:
        yield seen
