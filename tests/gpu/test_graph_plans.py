"""Batches prepared ahead by a graph on a stream of its own, while another graph works on the last one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from recemb import EmbeddingBagCollection
from recemb_kernels.triton_frame.graph_plans import Planned
from recemb_kernels.triton_frame.graphs import GraphedGroup
from recemb_kernels.triton_frame.verdict import poll
from tests.gpu.device import IS_REAL, needs_gpu, takes_minutes
from tests.gpu.test_collection import loss_of, trained
from tests.gpu.test_graphs import batch, made
from tests.kernels.triton.graph_scripts import SCRIPTS, follow

pytestmark = [pytest.mark.gpu, takes_minutes]


def test_prefetched_batches(groups_made: list[GraphedGroup], brought: list[bool]) -> None:
    given = [batch(seed) for seed in range(9)]
    states = [trained(made("adagrad"), given, ahead) for ahead in (False, True)]
    assert [group.graphs for group in groups_made] == [1, 1]
    # The fourth look-up is captured, for which its batch is planned twice; later ones find theirs done.
    assert brought == [False, False, *5 * [True]]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@needs_gpu
def test_a_graph_prepares_beside_what_runs(brought: list[bool]) -> None:
    gpu, following, beside = made("adagrad"), batch(9), torch.cuda.Stream()
    following.sync()
    trained(gpu, [batch(seed) for seed in range(9)], True)
    with torch.cuda.stream(beside):
        gpu.prefetch(batch(8))  # else the driver were asked for memory below, and may wait for what runs
    gpu._ahead.clear()
    poll(wait=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    slept = torch.cuda.Event()
    slept.record()
    with torch.cuda.stream(beside):
        gpu.prefetch(following)
    _, _, (bags, _) = gpu._ahead[id(following)]
    assert bags.ahead is not None
    planned = bags.ahead.wait()
    assert isinstance(planned, Planned)
    assert planned.ready is not None
    planned.ready.done.synchronize()
    assert not slept.query(), "it has waited for what runs"
    brought.clear()
    loss_of(gpu(following).values()).backward()
    assert brought == [True]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("graphs", ["0", "1"])
def test_batches_prepared_on_a_stream_of_their_own(
    graphs: str, weighted: bool, monkeypatch: pytest.MonkeyPatch, brought: list[bool]
) -> None:
    """As torchrec's prefetching pipeline does it, while the step before is far from done.

    Weights are float64, of which preparing makes a float32 copy that nobody else refers to.
    """
    monkeypatch.setenv("RECEMB_CUDA_GRAPHS", graphs)
    given, states = [wide(batch(seed, weighted=weighted)) for seed in range(10)], []
    beside = torch.cuda.Stream()
    for ahead in (False, True):
        gpu = made("adagrad", weighted)
        for k, kjt in enumerate(given):
            torch.cuda._sleep(5_000_000)
            loss = loss_of(gpu(kjt).values())
            with torch.cuda.stream(beside):
                if ahead and k + 1 < len(given):
                    gpu.prefetch(given[k + 1])
            loss.backward()
            with torch.cuda.stream(beside):
                # What the look-up has not kept is overwritten here.
                for count in (1, kjt.values().numel(), 2 * kjt.values().numel(), kjt.offsets().numel()):
                    _ = [
                        torch.full((count,), -1, dtype=kind, device="cuda")
                        for kind in (torch.int32, torch.int64)
                    ]
        states.append([p.detach().clone() for p in gpu.parameters()])
    assert brought == ([False, False, *6 * [True]] if graphs == "1" else [])
    poll(wait=True)
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def wide(kjt: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """Its weights in float64."""
    weights = kjt.weights_or_none()
    if weights is None:
        return kjt
    return KeyedJaggedTensor(kjt.keys(), kjt.values(), weights=weights.double(), lengths=kjt.lengths())


class Scripted:
    """A collection that follows a script."""

    def __init__(self, gpu: EmbeddingBagCollection, groups: Sequence[GraphedGroup]) -> None:
        self._gpu, self._groups = gpu, groups
        self._batches = {k: batch(30 + k) for k in (1, 2, 3)}

    def prepare(self, k: int) -> None:
        self._gpu.prefetch(self._batches[k])

    def drop(self, k: int) -> None:
        self._gpu._ahead.pop(id(self._batches[k]), None)

    def look_up(self, k: int) -> Tensor:
        return self._gpu(self._batches[k]).values()

    def forget_graphs(self) -> None:
        for group in self._groups:
            group._graphs.clear()

    def parameters(self) -> Sequence[Tensor]:
        return list(self._gpu.parameters())


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_whatever_comes_between(
    script: tuple[str, list[bool]], groups_made: list[GraphedGroup], brought: list[bool]
) -> None:
    (words, expected), found = script, []
    if not IS_REAL and any(word[0] == "t" for word in words.split()):
        pytest.skip("the stand-in has one thread")
    for ahead in (False, True):
        gpu = made("adagrad")
        trained(gpu, [batch(seed) for seed in range(8)], ahead)
        torch.cuda._sleep(20_000_000)
        brought.clear()
        found.append(follow(words, Scripted(gpu, groups_made), ahead))
        assert brought == (expected if ahead else [])
    poll(wait=True)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("graphs", ["0", "1"])
@pytest.mark.parametrize("prepared", ["before", "in it"])
def test_a_callers_capture_of_a_prepared_batch(
    prepared: str, graphs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for nothing outside, leaves no stream within, and its replays read the ids of then."""
    monkeypatch.setenv("RECEMB_CUDA_GRAPHS", graphs)
    gpu, kjt, others = made(None), batch(1), [batch(seed) for seed in (2, 3)]
    own, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        expected = [gpu(other).values() for other in others]
        torch.cuda.synchronize()
        with torch.cuda.stream(own):
            for _ in range(2):
                gpu(kjt)
        own.synchronize()
        if prepared == "before":
            gpu.prefetch(kjt)
        with torch.cuda.graph(graph, stream=own):
            if prepared == "in it":
                gpu.prefetch(kjt)
            found = gpu(kjt).values()
        for other, out in zip(others, expected, strict=True):
            kjt.values().copy_(other.values())
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(found, out)
    poll(wait=True)
