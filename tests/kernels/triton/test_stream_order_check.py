"""The check of streams finds each kind of fault, and lets pass what is ordered."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.triton.fake_gpu import FakeGpu, on_gpu
from tests.kernels.triton.stream_order import CUDA, OrderError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")


def read_elsewhere(gpu: FakeGpu, x: Tensor, graph: Any) -> None:
    x.add_(1)
    with gpu.stream(gpu.draw()):
        x.sum()


def write_elsewhere(gpu: FakeGpu, x: Tensor, graph: Any) -> None:
    x.sum()
    with gpu.stream(gpu.draw()):
        x.add_(1)


def free_too_early(gpu: FakeGpu, x: Tensor, graph: Any) -> None:
    beside = gpu.draw()
    y = x + 1
    beside.wait_stream(gpu.current())
    with gpu.stream(beside):
        y.sum()
    del y
    x + 1


def capture(gpu: FakeGpu, graph: Any, run: Callable[[], Any]) -> Any:
    with torch.cuda.graph(graph, stream=gpu.draw()):
        return run()


def replay_what_is_freed(gpu: FakeGpu, x: Tensor, graph: Any) -> None:
    held = [x + 1]
    capture(gpu, graph, lambda: held.pop().add_(1))
    graph.replay()


def read_before_a_replay(gpu: FakeGpu, x: Tensor, graph: Any) -> None:
    y = capture(gpu, graph, lambda: x + 1)
    y.sum()


def use_a_pool_twice(gpu: FakeGpu, x: Tensor, graph: Any) -> None:
    """The second graph may lie where the first one leaves what the third one reads."""
    pool, stream, others = torch.cuda.graph_pool_handle(), gpu.draw(), [torch.cuda.CUDAGraph() for _ in "12"]
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        y = x + 1
    with torch.cuda.graph(others[0], pool=pool, stream=stream):
        x.add_(y)
    del y
    with torch.cuda.graph(others[1], pool=pool, stream=stream):
        x + 2
    for each in (graph, others[1], others[0]):
        each.replay()


def multiply_in_memory_that_is_gone(gpu: FakeGpu, x: Tensor, graph: Any) -> None:
    stream, first = gpu.draw(), torch.cuda.CUDAGraph()
    for each in (first, graph):
        with torch.cuda.graph(each, stream=stream):
            torch.mm(x[None], x[:, None])
    graph.replay()
    del first, each
    graph.replay()


def read_a_value(gpu: FakeGpu, x: Tensor, graph: Any) -> None:
    capture(gpu, graph, lambda: x.sum().item())


def copy_a_list(gpu: FakeGpu, x: Tensor, graph: Any) -> None:
    capture(gpu, graph, lambda: torch.tensor([1], device=CUDA))


def leave_a_stream(gpu: FakeGpu, x: Tensor, graph: Any) -> None:
    capture(gpu, graph, lambda: gpu.draw().wait_stream(gpu.current()))


def wait_for_outside(gpu: FakeGpu, x: Tensor, graph: Any) -> None:
    done = gpu.current().record_event()
    capture(gpu, graph, lambda: gpu.current().wait_event(done))


def read_where_that_is_refused(gpu: FakeGpu, x: Tensor, graph: Any) -> None:
    torch.cuda.set_sync_debug_mode("error")
    gpu.synchronize()  # as torch's own, which tells of operations and streams
    x.sum().item()


def repeat_where_that_is_refused(gpu: FakeGpu, x: Tensor, graph: Any) -> None:
    torch.cuda.set_sync_debug_mode("error")
    torch.repeat_interleave(x, x.long(), output_size=3)
    torch.repeat_interleave(x, x.long())


def wait_where_that_is_refused(gpu: FakeGpu, x: Tensor, graph: Any) -> None:
    torch.cuda.set_sync_debug_mode("error")
    gpu.draw().synchronize()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (read_elsewhere, "reads what nothing orders"),
        (write_elsewhere, "writes what nothing orders"),
        (free_too_early, "freed before"),
        (replay_what_is_freed, "has been freed"),
        (read_before_a_replay, "no replay has filled"),
        (use_a_pool_twice, "in its place"),
        (multiply_in_memory_that_is_gone, "workspace"),
        (read_a_value, "broken off"),
        (copy_a_list, "broken off"),
        (leave_a_stream, "has not come back"),
        (wait_for_outside, "broken off"),
        (read_where_that_is_refused, "synchronizing.*scalar"),
        (repeat_where_that_is_refused, "synchronizing.*repeat"),
        (wait_where_that_is_refused, "synchronizing.*Stream"),
    ],
)
def test_the_check_itself(run: Callable[[FakeGpu, Tensor, Any], None], message: str) -> None:
    def checked() -> None:
        with on_gpu() as gpu:
            x, graph = torch.tensor([1.0, 2.0], device=CUDA), torch.cuda.CUDAGraph()
            run(gpu, x, graph)

    with pytest.raises((OrderError, RuntimeError), match=message):
        checked()


def pass_on_what_is_ordered(gpu: FakeGpu) -> None:
    x, beside = torch.tensor([1.0, 2.0], device=CUDA), gpu.draw()
    y = x + 1
    beside.wait_stream(gpu.current())
    with gpu.stream(beside):
        z = y + 1
        y.record_stream(beside)
    del y
    x + 1
    gpu.current().wait_stream(beside)
    z.record_stream(gpu.current())
    assert (z + x).tolist() == [4, 6]


def test_what_is_ordered_passes() -> None:
    with on_gpu() as gpu:
        pass_on_what_is_ordered(gpu)


def test_a_graph_is_gone_once_nobody_has_it_and_the_host_has_seen_its_results() -> None:
    """Whatever events of its capture there still are."""
    with on_gpu() as gpu:
        x, graph, events = torch.tensor([1.0, 2.0], device=CUDA), torch.cuda.CUDAGraph(), []

        def run() -> Tensor:
            events.append(gpu.current().record_event())
            return x + 1

        with torch.cuda.graph(graph, stream=gpu.draw()):
            y = run()
        graph.replay()
        assert torch.equal(y, torch.tensor([2.0, 3.0], device=CUDA))
        known = weakref.ref(graph)
        del graph, y
        assert known() is None
        assert len(events) == 1
