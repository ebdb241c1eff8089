"""What a capture leaves behind that fails, or whose graph is dropped: torch's own parts are stand-ins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recemb_kernels.triton_frame import recorder, streams
from recemb_kernels.triton_frame.recorder import GraphRecorder
from recemb_kernels.triton_frame.streams import NoStreamError, own_stream
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
        captured: the streams that it has captured on.
    """

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.breaks, self.drawn = False, 0
        self.captured: list[str] = []
        self._recording = False

    def stream(self, name: str) -> Any:
        return SimpleNamespace(
            name=name,
            cuda_stream=hash(name),
            wait_stream=lambda other: self.calls.append((name, "waits", other.name)),
        )

    def draw(self, _: torch.device) -> Any:
        self.drawn += 1
        return self.stream(f"own {(self.drawn - 1) % 32 + 1}")

    @contextmanager
    def graph(self, graph: Any, *, pool: Any, stream: Any, **_: Any) -> Iterator[None]:
        assert pool == POOL
        self.captured.append(stream.name)
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
        "current_stream": lambda _: made.stream("user's"),
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
    monkeypatch.setattr(streams, "_free", {})
    monkeypatch.setattr(streams, "_drawn", set())
    monkeypatch.setattr(streams, "_lent", Counter())
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
    assert fake.calls == ["replay", ("own 1", "waits", "user's"), "destroyed"]


def test_graphs_that_live_at_once_are_captured_on_streams_of_their_own(fake: Torch) -> None:
    """But for those of one recorder. torch has 32, which go round: those of dropped ones are used again."""
    records = [_record() for _ in range(3)]
    for record in records:
        assert [record(lambda: 5)[0] for _ in range(2)] == [5, 5]
    assert fake.captured == ["own 1", "own 1", "own 2", "own 2", "own 3", "own 3"]
    _, replay = records[1](lambda: 5)
    del record
    records.clear()
    _record()(lambda: 5)
    assert fake.captured[-1] in ("own 1", "own 3"), "a graph of the second's can still be replayed"
    others = [_record(), _record()]
    assert fake.drawn == 3
    del replay, others
    for _ in range(9):
        _record()(lambda: 5)
    assert fake.drawn == 3


@pytest.mark.parametrize("early", [True, False])
def test_no_stream_that_comes_round_is_taken_twice(early: bool, fake: Torch) -> None:
    """Of torch's 32; half of them are the caller's, pipelines' and data loaders'."""
    device, kept, names = torch.device("cuda", 1), [], set()
    if early:
        names.add(own_stream("prepare", device).name)
    for _ in range(16):
        kept.append(_record())
        kept[-1](lambda: 5)
        fake.drawn += 5  # by others
    if not early:
        names.add(own_stream("prepare", device).name)
    assert len(names | set(fake.captured)) == 17
    with pytest.raises(NoStreamError, match="16 streams already"):
        _record()
    del kept[0]
    _record()(lambda: 5)


def test_nothing_is_captured_where_a_capture_has_failed(fake: Torch) -> None:
    """cuBLAS's workspace may have been in the memory of that graph."""
    failing = _record()
    failing(lambda: 5)
    with pytest.raises(RuntimeError, match="out of memory"):
        failing(_fails)
    del failing
    _record()(lambda: 5)
    assert fake.captured == ["own 1", "own 1", "own 2"]


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
