"""What a look-up takes over from the stream that prepared its batch, and for how long: with stand-ins."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch
from torchrec import KeyedJaggedTensor

from recemb import EmbeddingBagCollection, EmbeddingBagConfig, HotRows, TensorTrain
from recemb.backends import build
from recemb.bags import Bags, check_on_device
from recemb.cache.device_streams import DeviceStreams
from recemb.engine import Engine
from recemb.spec import TableSpec
from recemb_kernels.gather_op import GatherOp
from recemb_kernels.triton_frame import graphs, streams, verdict
from recemb_kernels.triton_frame.group import TritonGroup
from recemb_kernels.triton_frame.streams import HandOver, own_stream, tensors_of
from recemb_kernels.tt_gather import TrainShape, tt_gather
from tests.kernels.triton.graph_cases import Model
from tests.kernels.triton.harness import by_triton

CUDA = torch.device("cuda", 0)


class Handed:
    """Notes which memory is taken over."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.times = 0

    def take(self, held: Any) -> None:
        self.times += 1
        self.taken += [tensor.data_ptr() for tensor in tensors_of(held)]


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> Handed:
    made = Handed()
    monkeypatch.setattr(HandOver, "now", lambda device: made)
    return made


def _collection() -> EmbeddingBagCollection:
    config = EmbeddingBagConfig(
        name="t",
        num_embeddings=50,
        embedding_dim=8,
        feature_names=["f", "g"],
        compression=TensorTrain(rank=2),
    )
    return EmbeddingBagCollection(tables=[config])


def test_the_map_of_a_variable_batch_is_taken_over(handed: Handed) -> None:
    ebc, inverse = _collection(), torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]])
    features = KeyedJaggedTensor(
        keys=["f", "g"],
        values=torch.tensor([1, 2, 3]),
        lengths=torch.tensor([1, 1, 1]),
        stride_per_key_per_rank=[[2], [1]],
        inverse_indices=(["f", "g"], inverse),
    )
    ebc.prefetch(features)
    _, _, (_, made) = ebc._ahead[id(features)]
    assert made is not None
    ebc(features)
    assert made.data_ptr() in handed.taken


def test_offsets_of_a_batch_that_was_written_to_are_taken_over(handed: Handed) -> None:
    ebc, lengths = _collection(), torch.tensor([1, 1, 1, 1])
    features = KeyedJaggedTensor(keys=["f", "g"], values=torch.tensor([1, 2, 3, 4]), lengths=lengths)
    ebc.prefetch(features)
    features.values().add_(1)
    ebc(features)
    assert features.offsets().data_ptr() in handed.taken


def test_a_caller_that_captures_takes_nothing_over(handed: Handed, monkeypatch: pytest.MonkeyPatch) -> None:
    ebc, lengths = _collection(), torch.tensor([1, 1, 1, 1])
    features = KeyedJaggedTensor(keys=["f", "g"], values=torch.tensor([1, 2, 3, 4]), lengths=lengths)
    ebc.prefetch(features)
    monkeypatch.setattr("recemb.bags.capturing", lambda: True)
    ebc(features)
    assert not handed.times


def test_the_index_of_cached_rows_is_taken_over(handed: Handed) -> None:
    """It is made by the look-up after an exchange, and read by the next batch's preparation too."""
    hot = HotRows(rows=8, policy="lfu", refresh_every=2, warmup=1)
    spec = TableSpec(
        name="t",
        num_embeddings=100,
        embedding_dim=8,
        feature_names=("f",),
        pooling="sum",
        compression=TensorTrain(rank=2, cache=hot),
    )
    tables, split = list(build([spec], torch.device("cpu")).values()), DeviceStreams([spec])
    split.split(tables, Bags(torch.tensor([3, 4, 7]), torch.arange(4), 1))
    assert not handed.times
    split.split(tables, Bags(torch.tensor([1, 9, 50]), torch.arange(4), 1))
    _, keys, slots, _ = split._keys
    assert {keys.data_ptr(), slots.data_ptr()} <= set(handed.taken)


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks up on the CPU by the interpreter")
def test_plans_go_with_their_step_though_marks_have_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host runs ahead of the GPU: it would hold the plan of every step between."""
    waiting: list[Callable[[], Exception]] = []
    monkeypatch.setattr("recemb.bags.note", lambda mark, error: waiting.append(error))
    monkeypatch.setattr(Engine, "_check", lambda self, served, bags: check_on_device(bags, self.targets))
    with by_triton():
        model, plans = Model("sgd", methods=("tt",)), []
        for seed in range(3):
            bags = model.bags(seed)
            model.engine.prefetch(model.tables, bags)
            assert bags.ahead is not None
            plans.append(ref(bags.ahead.wait()))
            pooled = model.look_up(bags)
            pooled.sum().backward()
            del bags, pooled
        gc.collect()
        assert [plan() for plan in plans] == [None, None, None]
        assert len(waiting) == 3


def test_marks_arrive_in_pinned_memory_whatever_the_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    event = SimpleNamespace(record=lambda stream: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(verdict, "_pending", [])
    mark, asked = torch.zeros(1, dtype=torch.int32, device="meta"), []

    def empty(*_: Any, **settings: Any) -> Any:
        asked.append((settings["pin_memory"], settings.get("device")))
        return SimpleNamespace(copy_=lambda *_, **__: None)

    monkeypatch.setattr(torch, "empty", empty)
    verdict.note(mark, RuntimeError)
    assert asked == [(True, "cpu")]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    made: list[torch.device] = []
    monkeypatch.setattr(streams, "_own", {})
    monkeypatch.setattr(streams, "_drawn", set())

    def draw(device: torch.device) -> Any:
        made.append(device)
        return SimpleNamespace(cuda_stream=len(made))

    monkeypatch.setattr(torch.cuda, "Stream", draw)
    return made


def test_each_use_has_one_stream(drawn: list[torch.device]) -> None:
    first = own_stream("prepare", CUDA)
    assert own_stream("prepare", CUDA) is first
    assert own_stream("another", CUDA) is not first
    assert own_stream("prepare", torch.device("cuda", 1)) is not first
    assert len(drawn) == 3


def test_ops_hold_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They live as long as the process, and would keep the weights of programs that are gone."""
    monkeypatch.setattr(graphs, "are_wanted", lambda device: True)
    op: GatherOp[Any] = tt_gather
    shape = TrainShape((4, 5), (2, 4), (1, 3, 1))
    group = op._make_group(op.encode([shape]), (0, 0, 0), torch.device("meta"), torch.float32)
    assert isinstance(group, TritonGroup)
