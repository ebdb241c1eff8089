"""What the tests on a GPU watch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from recemb_kernels.digit_tree.group import Batch
from recemb_kernels.triton_frame.graph_plans import Planned, PlannedAhead
from recemb_kernels.triton_frame.graphs import GraphedGroup


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
    """Of each batch that comes to a graph beside which another one prepares: whether it has been prepared."""
    seen: list[bool] = []
    bring = PlannedAhead.bring

    def watched(self: PlannedAhead, batch: Batch, planned: Planned | None) -> None:
        seen.append(planned is not None)
        bring(self, batch, planned)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlannedAhead, "bring", watched)
        yield seen
