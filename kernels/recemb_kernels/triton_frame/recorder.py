"""What records launches in CUDA graphs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, TypeVar

import torch
from torch._C import _cuda_endAllocateToPool, _cuda_releasePool

from recemb_kernels.triton_frame.captures import capturing, exclusive
from recemb_kernels.triton_frame.streams import LentStream

_T = TypeVar("_T")
# Of a device's memory, what the graphs of one group of tables may hold.
_MOST_MEMORY = 1 / 16
# Graphs that the device has broken off, a few in a process: torch must not find their memory freed.
_broken: list[torch.cuda.CUDAGraph] = []


class Recorder(Protocol):
    """Records launches to be replayed.

    Attributes:
        num_bytes: of memory that what it has recorded holds.
        most_bytes: what all recorders of a group may hold.
    """

    num_bytes: int
    most_bytes: int

    def __call__(self, run: Callable[[], _T]) -> tuple[_T, Callable[[], None]]:
        """Record ``run``; its result, whose tensors each replay fills, and the replay."""


class GraphRecorder:
    """Captures the graphs of one shape, which share a memory pool and a stream.

    A replay may overwrite what another graph of its pool holds for later: other shapes have their own pools.
    They have their own streams, too: cuBLAS has one workspace a stream, in the memory of the graph that was
    captured there first, and torch frees it with any of that stream's, whatever the others read and write.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()
        self._lent = LentStream(device)
        self.num_bytes = 0
        self.most_bytes = int(_MOST_MEMORY * torch.cuda.get_device_properties(device).total_memory)

    def __call__(self, run: Callable[[], _T]) -> tuple[_T, Callable[[], None]]:
        """A graph of ``run``, which is not run.

        Raises:
            RuntimeError: it cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        # Other threads may allocate pinned memory meanwhile, as data loaders do.
        mode = "thread_local"
        with exclusive:
            try:
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._lent.stream, capture_error_mode=mode
                ):
                    before = torch.cuda.memory_reserved(self._device)
                    try:
                        result = run()
                    finally:
                        # Of all that is allocated meanwhile; there may be other threads.
                        self.num_bytes += max(0, torch.cuda.memory_reserved(self._device) - before)
            except BaseException:
                self._lent.spent = True  # cuBLAS's workspace may be in memory that is gone
                self._give_up(graph)
                raise
            finally:
                # torch stays on the capture's stream when a capture fails.
                torch.cuda.set_stream(current)
        return result, _Replay(graph, self._lent, current)

    def _give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """Tell torch's allocator of the device that a capture is over which the device has broken off.

        It takes no notice of that: it would go on waiting for the end before it frees any memory that several
        streams have used. Its allocator of pinned memory cannot be told, and goes on asking the graph.
        """
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        with suppress(RuntimeError):  # where torch has been able to end the capture itself
            _cuda_endAllocateToPool(index, self._pool)
            _broken.append(graph)
            _cuda_releasePool(index, self._pool)


class _Replay:
    """Replays a graph on the stream that it was captured for.

    Args:
        graph: the launches.
        recorded: has the stream that their memory belongs to, for as long as they may be replayed.
        replayed: the only stream that replays them.
    """

    def __init__(
        self, graph: torch.cuda.CUDAGraph, recorded: LentStream, replayed: torch.cuda.Stream
    ) -> None:
        self._graph, self._recorded, self._replayed = graph, recorded, replayed

    def __call__(self) -> None:
        self._graph.replay()

    def __del__(self) -> None:
        # With expandable segments torch unmaps freed memory once the stream that it belongs to is done, which
        # knows nothing of replays. A caller's capture must see nothing of it.
        with suppress(RuntimeError):  # of the device, which the next call reports
            if not sys.is_finalizing() and not capturing():
                with torch.cuda.stream(self._replayed):
                    if not capturing():
                        self._recorded.stream.wait_stream(self._replayed)
