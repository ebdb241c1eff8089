"""The code for a GPU orders its streams: whatever a launch touches comes after what touched it before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import KeyedJaggedTensor

from recemb import Dense, EmbeddingBagCollection, EmbeddingBagConfig, HotRows, MixedDimension, TensorTrain
from recemb_kernels.triton_frame.family import Call
from recemb_kernels.triton_frame.graph_plans import PlanGraph
from recemb_kernels.triton_frame.graphs import GraphedGroup
from recemb_kernels.triton_frame.group import TritonGroup
from recemb_kernels.triton_frame.recorder import _Replay
from recemb_kernels.triton_frame.streams import HandOver, own_stream, tensors_of
from tests.kernels.triton.fake_gpu import FakeGpu, on_gpu
from tests.kernels.triton.stream_order import CUDA, OrderError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")

GRAPHS = pytest.mark.parametrize("graphs", ["0", "1"])
ROWS, SIZE = 40, 3


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with on_gpu() as made:
        yield made


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[GraphedGroup]:
    """Those that are made in a test."""
    made: list[GraphedGroup] = []
    begin = GraphedGroup.__init__

    def watched(self: GraphedGroup, *args: Any) -> None:
        begin(self, *args)
        made.append(self)

    monkeypatch.setattr(GraphedGroup, "__init__", watched)
    return made


def collection(cached: bool = False, weighted: bool = False, steps: bool = True) -> EmbeddingBagCollection:
    torch.manual_seed(0)
    hot = HotRows(rows=8, policy="lfu", refresh_every=3, warmup=1) if cached else None
    methods = {"dense": Dense(), "md": MixedDimension(dim=2), "tt": TensorTrain(rank=2, cache=hot)}
    if not cached:
        del methods["tt"]
    configs = [
        EmbeddingBagConfig(
            name=f"t_{name}",
            num_embeddings=ROWS,
            embedding_dim=8,
            feature_names=[name],
            compression=compression,
        )
        for name, compression in methods.items()
    ]
    made = EmbeddingBagCollection(tables=configs, device=CUDA, is_weighted=weighted)
    if steps:
        apply_optimizer_in_backward(torch.optim.Adagrad, made.parameters(), {"lr": 0.1})
    return made


def batch(ebc: EmbeddingBagCollection, seed: int, size: int = SIZE) -> KeyedJaggedTensor:
    """Two ids a bag; weights are float64, of which look-ups make a copy."""
    keys = [name for config in ebc.embedding_bag_configs() for name in config.feature_names]
    generator, count = torch.Generator().manual_seed(seed), 2 * size * len(keys)
    ids = torch.randint(0, ROWS, (count,), generator=generator).tolist()
    weights = torch.rand(count, generator=generator).tolist() if ebc.is_weighted() else None
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.tensor(ids, device=CUDA),
        lengths=torch.tensor([2] * (count // 2), device=CUDA),
        weights=None if weights is None else torch.tensor(weights, dtype=torch.float64, device=CUDA),
    )


def step(out: Tensor) -> None:
    torch.sin(out).sum().backward()


def train(
    ebc: EmbeddingBagCollection,
    gpu: FakeGpu,
    ahead: str = "",
    steps: int = 8,
    between: Callable[[int], None] = lambda k: None,
) -> list[Tensor]:
    """The weights after some steps.

    Args:
        ahead: the stream on which the next batch is prepared before a step's backward: its own or ``beside``.
        between: called before each step.
    """
    beside = gpu.draw() if ahead == "beside" else gpu.current()
    # All made first, as to copy a batch there has the host wait; each is dropped after its step.
    batches = deque(batch(ebc, seed) for seed in range(steps))
    for k in range(steps):
        between(k)
        out = ebc(given := batches.popleft()).values()
        if ahead and batches:
            with gpu.stream(beside):
                ebc.prefetch(batches[0])
        step(out)
        del given, out
    return [p.detach().clone() for p in ebc.parameters()]


@GRAPHS
@pytest.mark.parametrize("weighted", [False, True])
def test_training(graphs: str, weighted: bool, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECEMB_CUDA_GRAPHS", graphs)
    states = [train(collection(weighted=weighted), gpu, ahead) for ahead in ("", "own", "beside")]
    for other in states[1:]:
        assert all(map(torch.equal, states[0], other))


def nothing(*_: Any, **__: Any) -> None:
    return None


def take_without_waiting(self: HandOver, held: Any) -> None:
    own = torch.cuda.current_stream()
    for tensor in tensors_of(held) if own != self.stream else ():
        tensor.record_stream(own)


def take_without_keeping(self: HandOver, held: Any) -> None:
    own = torch.cuda.current_stream()
    if own != self.stream:
        own.wait_event(self.done)


def replay_elsewhere(self: _Replay) -> None:
    with torch.cuda.stream(own_stream("elsewhere", CUDA)):
        self._graph.replay()


# What is changed, how, with which graphs, at which step, and what is found then.
MUTATIONS: dict[str, tuple[Any, str, Any, str, int, str]] = {
    "nobody waits": (HandOver, "take", take_without_waiting, "01", 6, "nothing orders"),
    "nothing is kept": (HandOver, "take", take_without_keeping, "01", 6, "freed before"),
    "nothing is held": (TritonGroup, "hold_beside", nothing, "01", 6, "nothing orders"),
    "replays elsewhere": (_Replay, "__call__", replay_elsewhere, "1", 6, "nothing orders"),
    "plans are not copied": (PlanGraph, "copied", lambda self: self._plan, "1", 0, "nothing orders"),
    "graphs share a plan": (Call, "copied", lambda self: self, "1", 0, "nothing orders"),
}


@pytest.mark.parametrize(
    ("name", "graphs"), [(name, graphs) for name, known in MUTATIONS.items() for graphs in known[3]]
)
def test_what_is_left_out_is_found(name: str, graphs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, what, instead, _, first, message = MUTATIONS[name]
    monkeypatch.setenv("RECEMB_CUDA_GRAPHS", graphs)

    def change(k: int) -> None:
        if k == first:
            monkeypatch.setattr(owner, what, instead)

    with pytest.raises(OrderError, match=message), on_gpu() as gpu:
        train(collection(weighted=True), gpu, "beside", 10, change)
