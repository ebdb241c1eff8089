"""CUDA graphs against eager launches: the same bits, through real captures."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import KeyedJaggedTensor

from recemb import EmbeddingBagCollection
from recemb_kernels.triton_frame.graphs import GraphedGroup
from recemb_kernels.triton_frame.group import TritonGroup
from recemb_kernels.triton_frame.verdict import poll
from tests.gpu.device import BATCH, needs_gpu, takes_minutes
from tests.gpu.test_collection import (
    METHODS,
    OPTIMIZERS,
    assert_a_bad_id_changes_nothing,
    collection,
    loss_of,
    step_without_waiting,
    trained,
)

pytestmark = [pytest.mark.gpu, takes_minutes]


def batch(seed: int, size: int = BATCH, weighted: bool = False) -> KeyedJaggedTensor:
    """Two ids a bag, so that all batches of one size have a shape."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.full((len(METHODS) * size,), 2)
    values = (torch.rand(2 * lengths.numel(), generator=generator) ** 2 * 5000).long()
    weights = torch.rand(values.numel(), generator=generator) if weighted else None
    kjt = KeyedJaggedTensor(keys=list(METHODS), values=values, lengths=lengths, weights=weights)
    return kjt.to("cuda")


def made(optimizer: str | None, weighted: bool = False) -> EmbeddingBagCollection:
    gpu = collection("cuda", weighted)
    if optimizer is not None:
        kind, settings = OPTIMIZERS[optimizer]
        apply_optimizer_in_backward(kind, gpu.parameters(), settings)
    return gpu


def run(gpu: EmbeddingBagCollection, weighted: bool) -> list[Tensor]:
    found = []
    for seed in range(8):
        for p in gpu.parameters():
            p.grad = None
            for held in getattr(p, "_in_backward_optimizers", []):
                held.param_groups[0]["lr"] = 0.1 / (1 + seed)
        out = gpu(batch(seed, weighted=weighted)).values()
        loss_of(out).backward()
        found += [out.detach(), *(p.grad for p in gpu.parameters() if p.grad is not None)]
        if seed == 5:  # another shape between two replays
            loss_of(gpu(batch(seed, size=BATCH // 4, weighted=weighted)).values()).backward()
    return [*found, *(p.detach().clone() for p in gpu.parameters())]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("optimizer", [None, *OPTIMIZERS])
def test_bits_of_eager_launches(
    optimizer: str | None,
    weighted: bool,
    monkeypatch: pytest.MonkeyPatch,
    groups_made: list[GraphedGroup],
) -> None:
    found = run(made(optimizer, weighted), weighted)
    assert sum(group.graphs for group in groups_made) >= 1
    monkeypatch.setenv("RECEMB_CUDA_GRAPHS", "0")
    groups_made.clear()
    expected = run(made(optimizer, weighted), weighted)
    assert not groups_made
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_shapes_whose_steps_overlap() -> None:
    """A replay must not touch what another shape's backward still needs."""
    states = []
    for graphs in ("1", "0"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RECEMB_CUDA_GRAPHS", graphs)
            gpu = made("adagrad")
            for seed in range(6):
                loss_of(gpu(batch(seed, size=BATCH // 4)).values()).backward()
            for seed in range(6):
                loss_of(gpu(batch(seed)).values()).backward()
            for seed in range(4):
                one, two = gpu(batch(seed)).values(), gpu(batch(seed, size=BATCH // 4)).values()
                with torch.no_grad():
                    gpu(batch(seed, size=BATCH // 8))
                loss_of(one).backward()
                loss_of(two).backward()
            states.append([p.detach().clone() for p in gpu.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@needs_gpu
def test_nothing_is_written_to_what_a_dropped_graph_has_held(groups_made: list[GraphedGroup]) -> None:
    """As cuBLAS's workspace would be, were graphs of two shapes captured on one stream."""
    gpu = made("adagrad")
    for size in (BATCH // 4, BATCH):
        for seed in range(6):
            loss_of(gpu(batch(seed, size=size)).values()).backward()
    (group,) = groups_made
    first, _ = group._graphs
    del group._graphs[first]
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    held = torch.full((2**25,), 7.0, device="cuda")
    for seed in range(4):
        loss_of(gpu(batch(seed)).values()).backward()
    torch.cuda.synchronize()
    assert group.graphs == 1
    assert bool((held == 7).all())


@needs_gpu
def test_a_failed_capture_leaves_the_look_up_eager(
    monkeypatch: pytest.MonkeyPatch, groups_made: list[GraphedGroup]
) -> None:
    plain, gpu = made("adagrad"), made("adagrad")
    capture = TritonGroup.run_forward

    def waits(self: TritonGroup, *args: Any, **kwargs: Any) -> Any:
        found = capture(self, *args, **kwargs)
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return found

    stream = torch.cuda.current_stream()
    given = [batch(seed) for seed in range(8)]
    with monkeypatch.context() as patch:
        patch.setattr(TritonGroup, "run_forward", waits)
        with pytest.warns(UserWarning, match="stay eager"):
            trained(gpu, given, False)
    assert torch.cuda.current_stream() == stream
    assert not sum(group.graphs for group in groups_made)
    # torch frees what two streams have used, and other look-ups are captured.
    before, held = torch.cuda.memory_allocated(), torch.empty(2**26, device="cuda")
    held.record_stream(torch.cuda.Stream())
    del held
    torch.cuda.synchronize()
    torch.empty(1, device="cuda")
    assert torch.cuda.memory_allocated() <= before
    other = made("adagrad")
    found = trained(other, given, False)
    assert sum(group.graphs for group in groups_made) == 1
    monkeypatch.setenv("RECEMB_CUDA_GRAPHS", "0")
    expected = trained(plain, given, False)
    for weights in (found, [p.detach() for p in gpu.parameters()]):
        assert all(torch.equal(a, b) for a, b in zip(expected, weights, strict=True))


def test_a_replay_never_waits_for_the_gpu(groups_made: list[GraphedGroup]) -> None:
    gpu = made("adam")
    kjt = batch(1)
    kjt.sync()
    for _ in range(7):
        loss_of(gpu(kjt).values()).backward()
    assert sum(group.graphs for group in groups_made) == 1
    step_without_waiting(gpu, kjt)


def test_a_bad_id_in_a_replay_is_named_and_changes_nothing() -> None:
    gpu = made("rowwise_adagrad")
    for seed in range(6):
        loss_of(gpu(batch(seed)).values()).backward()
    before = next(iter(gpu.parameters())).detach().clone()
    assert_a_bad_id_changes_nothing(gpu, batch(9))
    loss_of(gpu(batch(10)).values()).backward()
    poll(wait=True)
    assert not torch.equal(before, next(iter(gpu.parameters())))


DROPPED_DURING_A_REPLAY = """
import torch
from recemb_kernels.triton_frame.graphs import GraphedGroup
from tests.gpu.test_graphs import batch, made

seen, begin = [], GraphedGroup.__init__
GraphedGroup.__init__ = lambda self, *args: (begin(self, *args), seen.append(self))[0]
gpu, kjt = made(None), batch(1)
with torch.no_grad():
    expected = [gpu(kjt).values() for _ in range(6)][-1]
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    found = gpu(kjt).values()
    assert sum(group.graphs for group in seen) == 1
    for group in seen:
        group._graphs.clear()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    assert torch.equal(expected, found)
    assert any(segment["is_expandable"] for segment in torch.cuda.memory_snapshot())
"""


@needs_gpu
def test_memory_of_a_dropped_graph_outlives_its_replay() -> None:
    """Under expandable segments, whose memory is unmapped without waiting for all streams."""
    path, setting = os.pathsep.join(filter(None, sys.path)), "expandable_segments:True"
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the first one goes before the second
    done = subprocess.run(
        [sys.executable, "-c", DROPPED_DURING_A_REPLAY],
        env={**os.environ, **dict.fromkeys(names, setting), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
