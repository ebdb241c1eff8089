"""The workspace of cuBLAS's products in a graph outlives it, whatever becomes of other graphs."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch

from recemb_kernels.triton_frame import recorder
from recemb_kernels.triton_frame.graphs import GraphedGroup
from recemb_kernels.triton_frame.streams import LentStream
from tests.kernels.triton.fake_gpu import on_gpu
from tests.kernels.triton.stream_order import CUDA, OrderError
from tests.kernels.triton.test_stream_order import batch, collection, step

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the same on the GPU")

SIZES = 2, 3


def _drop_one_of_two(groups: list[GraphedGroup], dropped: int) -> None:
    """Of two sizes' graphs, which multiply by a mixed-dimension table's projection, and replay the other."""
    with on_gpu():
        ebc = collection("md")
        for size in SIZES:
            for k in range(6):
                step(ebc(batch(ebc, k, size)).values())
        assert [group.graphs for group in groups] == [2]
        del groups[0]._graphs[list(groups[0]._graphs)[dropped]]
        gc.collect()
        for k in range(3):
            step(ebc(batch(ebc, k, SIZES[1 - dropped])).values())
        assert groups[0].graphs == 1


@pytest.mark.parametrize("dropped", [0, 1])
def test_a_graph_outlives_another(dropped: int, groups_made: list[GraphedGroup]) -> None:
    _drop_one_of_two(groups_made, dropped)


def test_graphs_of_one_stream_do_not(
    groups_made: list[GraphedGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    lent: list[LentStream] = []

    def same(device: torch.device) -> LentStream:
        lent[:] = lent or [LentStream(CUDA)]
        return lent[0]

    monkeypatch.setattr(recorder, "LentStream", same)
    with pytest.raises(OrderError, match="workspace"):
        _drop_one_of_two(groups_made, 0)


def test_without_a_stream_look_ups_are_eager_until_there_is_one(
    groups_made: list[GraphedGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is given up for that: neither graphs that there are nor later ones."""
    monkeypatch.setattr("recemb_kernels.triton_frame.graphs._PATIENCE", 5)
    with on_gpu(), warnings.catch_warnings():
        warnings.simplefilter("error")
        ebc = collection("md")

        def steps(size: int, ahead: bool = False) -> int:
            for k in range(12):
                given = batch(ebc, k, size)
                if ahead:
                    ebc.prefetch(given)
                step(ebc(given).values())
            return groups_made[0].graphs

        assert steps(2) == 1
        others = [LentStream(CUDA) for _ in range(15)]
        assert [steps(size) for size in (3, 4, 5, 6)] == [1, 1, 1, 1]
        # Nor to one that would plan ahead, for which there is no second stream.
        assert [steps(2), steps(2, ahead=True), steps(2)] == [1, 1, 1]
        (graph,) = groups_made[0]._graphs.values()
        assert graph.source.plans is None
        others.clear()
        assert [steps(size) for size in (3, 4)] == [2, 3]
        assert steps(2, ahead=True) == 3
        assert sum(graph.source.plans is not None for graph in groups_made[0]._graphs.values()) == 1
