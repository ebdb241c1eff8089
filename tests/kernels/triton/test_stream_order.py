"""The code for a GPU orders its streams: whatever a launch touches comes after what touched it before."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import KeyedJaggedTensor

from recemb import Dense, EmbeddingBagCollection, EmbeddingBagConfig, HotRows, MixedDimension, TensorTrain
from recemb.bags import Bags
from recemb_kernels.triton_frame.family import Call
from recemb_kernels.triton_frame.graph_plans import PlanGraph
from recemb_kernels.triton_frame.graphs import GraphedGroup
from recemb_kernels.triton_frame.group import TritonGroup
from recemb_kernels.triton_frame.recorder import _Replay
from recemb_kernels.triton_frame.streams import HandOver, own_stream, tensors_of
from tests.kernels.triton.fake_gpu import FakeGpu, on_gpu
from tests.kernels.triton.graph_scripts import SCRIPTS, brought, follow
from tests.kernels.triton.stream_order import CUDA, Event, OrderError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")

GRAPHS = pytest.mark.parametrize("graphs", ["0", "1"])
ROWS, SIZE = 40, 3


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with on_gpu() as made:
        yield made


def collection(*names: str, weighted: bool = False) -> EmbeddingBagCollection:
    """Tables of these methods, with an optimizer of their own."""
    torch.manual_seed(0)
    cached = TensorTrain(rank=2, cache=HotRows(rows=8, policy="lfu", refresh_every=3, warmup=1))
    methods = {"dense": Dense(), "tt": TensorTrain(rank=2), "md": MixedDimension(dim=2), "cached": cached}
    configs = [
        EmbeddingBagConfig(
            name=f"t_{name}",
            num_embeddings=ROWS,
            embedding_dim=8,
            feature_names=[name],
            compression=methods[name],
        )
        for name in names or ("dense",)
    ]
    made = EmbeddingBagCollection(tables=configs, device=CUDA, is_weighted=weighted)
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
        for p in ebc.parameters():
            p._in_backward_optimizers[0].param_groups[0]["lr"] = 0.1 / (1 + k)  # type: ignore[attr-defined]
        out = ebc(given := batches.popleft()).values()
        if ahead and batches:
            with gpu.stream(beside):
                ebc.prefetch(batches[0])
        step(out)
        del given, out
    return [p.detach().clone() for p in ebc.parameters()]


@GRAPHS
def test_training(graphs: str, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECEMB_CUDA_GRAPHS", graphs)
    states = [train(collection("dense", "md", weighted=True), gpu, ahead) for ahead in ("", "beside")]
    assert all(map(torch.equal, *states))


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


class Scripted:
    """A collection that follows a script, each batch on a stream beside."""

    def __init__(self, ebc: EmbeddingBagCollection, gpu: FakeGpu, groups: Sequence[GraphedGroup]) -> None:
        self._ebc, self._gpu, self._groups, self._beside = ebc, gpu, groups, gpu.draw()
        self._batches = {k: batch(ebc, 30 + k) for k in (1, 2, 3)}

    def prepare(self, k: int) -> None:
        with self._gpu.stream(self._beside):
            self._ebc.prefetch(self._batches[k])

    def drop(self, k: int) -> None:
        self._ebc._ahead.pop(id(self._batches[k]), None)

    def look_up(self, k: int) -> Tensor:
        with self._gpu.seeing():
            return self._ebc(self._batches[k]).values()

    def forget_graphs(self) -> None:
        for group in self._groups:
            group._graphs.clear()

    def parameters(self) -> Sequence[Tensor]:
        return list(self._ebc.parameters())


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_whatever_comes_between(
    script: tuple[str, list[bool]], gpu: FakeGpu, groups_made: list[GraphedGroup]
) -> None:
    ebc = collection()
    train(ebc, gpu, "beside", 6)
    with brought() as seen:
        follow(script[0], Scripted(ebc, gpu, groups_made), True)
    assert seen == script[1]


@GRAPHS
def test_cached_rows(graphs: str, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECEMB_CUDA_GRAPHS", graphs)
    train(collection("cached"), gpu, "beside", 7)


@GRAPHS
def test_a_batch_that_is_never_looked_up(graphs: str, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECEMB_CUDA_GRAPHS", graphs)
    ebc = collection()
    train(ebc, gpu, "beside", 6)
    batches = [batch(ebc, seed) for seed in range(4)]
    while batches:
        ebc.prefetch(batches.pop())
    ebc._ahead.clear()
    torch.zeros(100, device=CUDA)


@GRAPHS
def test_a_backward_that_another_stream_begins(
    graphs: str, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECEMB_CUDA_GRAPHS", graphs)
    ebc, forward, caller = collection(), gpu.current(), gpu.draw()
    batches = [batch(ebc, seed) for seed in range(8)]
    for given in batches:
        loss = torch.sin(ebc(given).values()).sum()
        with gpu.stream(caller), gpu.autograd(forward):
            loss.backward()


@GRAPHS
@pytest.mark.parametrize("ordered", [True, False])
def test_look_ups_on_two_streams(
    graphs: str, ordered: bool, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps must wait for each other, by the caller; look-ups alone need not."""
    monkeypatch.setenv("RECEMB_CUDA_GRAPHS", graphs)
    ebc, streams = collection(), [gpu.draw(), gpu.draw()]
    batches = [batch(ebc, seed) for seed in range(14)]
    for k, given in enumerate(batches):
        with gpu.stream(streams[k % 2]), torch.set_grad_enabled(ordered):
            if ordered:
                gpu.current().wait_stream(streams[1 - k % 2])
            out = ebc(given).values()
            if ordered:
                step(out)


@GRAPHS
def test_evaluation_between_steps(graphs: str, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECEMB_CUDA_GRAPHS", graphs)
    ebc = collection(weighted=True)
    others = [batch(ebc, 50 + k) for k in range(8)]

    def evaluate(k: int) -> None:
        with torch.inference_mode():
            ebc.eval()(others[k])
        ebc.train()

    train(ebc, gpu, "own", 8, evaluate)


@GRAPHS
def test_tables_that_are_replaced(graphs: str, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECEMB_CUDA_GRAPHS", graphs)
    ebc = collection()

    def replace(k: int) -> None:
        if k == 6:
            for p in ebc.parameters():
                p.data = p.data.clone()
            gc.collect()

    train(ebc, gpu, "beside", 11, replace)


@GRAPHS
def test_two_models_on_two_streams(graphs: str, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing orders them, nor need it."""
    monkeypatch.setenv("RECEMB_CUDA_GRAPHS", graphs)
    models, own = [collection(), collection()], [gpu.draw(), gpu.draw()]
    given = [[batch(ebc, seed) for seed in range(8)] for ebc in models]
    for k in range(8):
        for ebc, stream, batches in zip(models, own, given, strict=True):
            with gpu.stream(stream):
                out = ebc(batches[k]).values()
                if k < 7:
                    ebc.prefetch(batches[k + 1])
                step(out)


@GRAPHS
def test_prepared_look_ups_on_two_streams(graphs: str, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without steps nothing need order them; both take their plans from one graph."""
    monkeypatch.setenv("RECEMB_CUDA_GRAPHS", graphs)
    ebc, own = collection("tt"), [gpu.draw(), gpu.draw()]
    batches = [batch(ebc, seed) for seed in range(11)]
    with torch.no_grad(), brought() as seen:
        ebc.prefetch(batches[0])
        for k, given in enumerate(batches):
            with gpu.stream(own[k % 2]):
                if k + 1 < len(batches):
                    ebc.prefetch(batches[k + 1])
                ebc(given)
    assert (True in seen) == (graphs == "1")


@GRAPHS
def test_batches_that_a_stream_of_a_pipeline_copies(
    graphs: str, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrec's pipelines do it; the copying stream takes the memory of one for a later one."""
    monkeypatch.setenv("RECEMB_CUDA_GRAPHS", graphs)
    ebc, copies, beside = collection(weighted=True), gpu.draw(), gpu.draw()

    def copied(seed: int) -> KeyedJaggedTensor:
        with gpu.stream(copies):
            made = KeyedJaggedTensor(
                keys=["dense"],
                values=torch.tensor([seed % ROWS, 3, 3, 1], pin_memory=True).to(CUDA, non_blocking=True),
                lengths=torch.tensor([3, 1], pin_memory=True).to(CUDA, non_blocking=True),
                weights=torch.ones(4, pin_memory=True).to(CUDA, non_blocking=True),
            )
        beside.wait_stream(copies)
        with gpu.stream(beside):
            made.record_stream(gpu.current())
            ebc.prefetch(made)
        return made

    following = copied(0)
    for k in range(8):
        given = following
        gpu.current().wait_stream(beside)
        given.record_stream(gpu.current())
        out = ebc(given).values()
        following = copied(k + 1)
        step(out)
        del given, out


@GRAPHS
@pytest.mark.parametrize("prepared", ["", "before", "in it"])
def test_a_callers_capture(prepared: str, graphs: str, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for nothing outside, leaves no stream within, and reads the ids of each replay."""
    monkeypatch.setenv("RECEMB_CUDA_GRAPHS", graphs)
    ebc, own, graph = collection("dense", "md"), gpu.draw(), torch.cuda.CUDAGraph()
    kjt, other = batch(ebc, 1), batch(ebc, 2)
    with torch.no_grad():
        expected = ebc(other).values()
        own.wait_stream(gpu.current())
        with gpu.stream(own):
            for _ in range(6 if graphs == "1" else 1):
                ebc(kjt)
        gpu.current().wait_stream(own)
        if prepared == "before":
            ebc.prefetch(kjt)
        with torch.cuda.graph(graph, stream=own):
            if prepared == "in it":
                ebc.prefetch(kjt)
            found = ebc(kjt).values()
        kjt.values().copy_(other.values())
        graph.replay()
        assert torch.equal(found, expected)
    torch.cuda.synchronize()  # before the graph is dropped


@pytest.mark.parametrize("graphs", ["0", "1"])
def test_a_capture_that_waits_for_what_is_outside_is_found(
    graphs: str, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECEMB_CUDA_GRAPHS", graphs)
    ebc, own, graph = collection(), gpu.draw(), torch.cuda.CUDAGraph()
    kjt = batch(ebc, 1)
    ebc.prefetch(kjt)
    monkeypatch.setattr(Bags, "prepared_outside", False)
    with pytest.raises(RuntimeError, match="broken off"), torch.cuda.graph(graph, stream=own):
        ebc(kjt)


@pytest.mark.filterwarnings("ignore:recemb. look-ups sort")
def test_a_capture_that_fails(
    gpu: FakeGpu, groups_made: list[GraphedGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it runs, and look-ups go on."""
    run = TritonGroup.run_forward

    def waits(self: TritonGroup, *args: Any, **kwargs: Any) -> Any:
        found = run(self, *args, **kwargs)
        if gpu.capturing():
            torch.cuda.synchronize()
        return found

    with monkeypatch.context() as broken:
        broken.setattr(TritonGroup, "run_forward", waits)
        with pytest.warns(UserWarning, match="stay eager"):
            failed = train(collection(), gpu, "beside", 9)
    whole = train(collection(), gpu, "beside", 9)
    assert [group.graphs for group in groups_made] == [0, 1]
    assert gpu.current().cuda_stream == 0
    assert all(map(torch.equal, failed, whole))


def train_and_drop(groups: list[GraphedGroup]) -> None:
    with on_gpu() as gpu:
        train(collection(), gpu, "beside")
        assert sum(group.graphs for group in groups) == 1
        for group in groups:
            group._graphs.clear()
        gc.collect()


def test_memory_of_a_dropped_graph(groups_made: list[GraphedGroup], monkeypatch: pytest.MonkeyPatch) -> None:
    train_and_drop(groups_made)
    groups_made.clear()
    monkeypatch.setattr(_Replay, "__del__", nothing)
    with pytest.raises(OrderError, match="dropped graph"):
        train_and_drop(groups_made)


def train_once() -> None:
    with on_gpu() as gpu:
        train(collection(), gpu, "", 1)


def test_a_mark_that_is_read_too_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Event, "synchronize", nothing)
    with pytest.raises(OrderError, match="reads what nothing orders"):
        train_once()
