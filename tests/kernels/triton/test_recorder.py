"""What a capture leaves behind that fails, or whose graph is dropped: torch's own parts are stand-ins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recemb_kernels.triton_frame import recorder, streams
from recemb_kernels.triton_frame.recorder import GraphRecorder
from tests.kernels.triton.graph_cases import is_free_elsewhere

POOL = (0, 7)


class Graph:
    """Notes when it is replayed and destroyed."""

    def __init__(self, calls: list[Any]) -> None:
        self._calls = calls

    def replay(self) -> None:
        self._calls.append("replay")

    def __del__(self) -> None:
        self._calls.append("destroyed")


class Torch:
    """Its streams, captures and allocator on device 1.

    Attributes:
        calls: what it has been asked, in order.
        breaks: whether the device breaks a capture off, so that torch cannot end it.
        drawn: how many streams of its pool it has handed out.
        current: the current stream's name.
    """

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.breaks, self.drawn, self.current = False, 0, "user's"
        self._recording = False

    def stream(self, name: str) -> Any:
        return SimpleNamespace(
            name=name,
            cuda_stream=hash(name),
            wait_stream=lambda other: self.calls.append((name, "waits", other.name)),
        )

    def draw(self, _: torch.device) -> Any:
        self.drawn += 1
        return self.stream("own")

    @contextmanager
    def graph(self, graph: Any, *, pool: Any, **_: Any) -> Iterator[None]:
        assert pool == POOL
        self._recording = True
        try:
            yield
        finally:
            if self.breaks:
                raise RuntimeError("operation failed due to a previous error during capture")
            self._recording = False

    def end(self, device: int, pool: Any) -> None:
        if not self._recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self._recording = False
        self.calls.append(("end", device, pool))

    def release(self, device: int, pool: Any) -> None:
        self.calls.append(("release", device, pool))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Torch:
    made = Torch()
    parts = {
        "graph_pool_handle": lambda: POOL,
        "Stream": made.draw,
        "current_stream": lambda _: made.stream(made.current),
        "set_stream": lambda stream: made.calls.append(("back on", stream.name)),
        "get_device_properties": lambda _: SimpleNamespace(total_memory=2**30),
        "memory_reserved": lambda _: 0,
        "CUDAGraph": lambda: Graph(made.calls),
        "graph": made.graph,
        "stream": lambda _: nullcontext(),
    }
    for name, part in parts.items():
        monkeypatch.setattr(torch.cuda, name, part)
    monkeypatch.setattr(recorder, "_cuda_endAllocateToPool", made.end)
    monkeypatch.setattr(recorder, "_cuda_releasePool", made.release)
    monkeypatch.setattr(recorder, "_broken", [])
    monkeypatch.setattr(streams, "_own", {})
    return made


def _fails() -> None:
    raise RuntimeError("out of memory")


def _record() -> GraphRecorder:
    return GraphRecorder(torch.device("cuda", 1))


def test_the_allocator_learns_of_a_capture_that_the_device_breaks_off(fake: Torch) -> None:
    fake.breaks = True
    with pytest.raises(RuntimeError, match="during capture"):
        _record()(_fails)
    # torch may still ask the graph.
    assert fake.calls == [("end", 1, POOL), ("release", 1, POOL), ("back on", "user's")]


def test_a_capture_that_torch_ends_is_left_to_it(fake: Torch) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        _record()(_fails)
    assert fake.calls == [("back on", "user's"), "destroyed"]


def test_memory_outlives_the_last_replay(fake: Torch) -> None:
    result, replay = _record()(lambda: 5)
    fake.calls.clear()
    replay()
    del replay
    assert result == 5
    assert fake.calls == ["replay", ("own", "waits", "user's"), "destroyed"]


def test_captures_draw_a_stream_for_each_that_replays(fake: Torch) -> None:
    """Of 32, which go round: a pipeline's own would come to be among them."""
    for _ in range(3):
        record = _record()
        for _ in range(2):
            record(lambda: 5)
    assert fake.drawn == 1
    fake.current = "another"  # a workspace of cuBLAS's belongs to a stream
    _record()(lambda: 5)
    assert fake.drawn == 2


def test_no_other_thread_tunes_or_captures_beside_a_capture(fake: Torch) -> None:
    free, _ = _record()(is_free_elsewhere)
    assert not free
    with pytest.raises(RuntimeError, match="out of memory"):
        _record()(_fails)
    assert is_free_elsewhere()


def test_no_stream_waits_within_the_callers_capture(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    _, replay = _record()(lambda: 5)
    fake.calls.clear()
    monkeypatch.setattr(recorder, "capturing", lambda: True)
    del replay
    assert fake.calls == ["destroyed"]
