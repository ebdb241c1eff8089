"""A GPU that is none, to check the order of what its streams are given.

Streams, events, captures and replays are stand-ins that keep vector clocks (those of torch's own sanitizer
for CUDA). An access must come after the earlier ones of its memory: in the order of one stream, by an event,
or as the host has waited. Memory that is freed goes to whatever its stream allocates next. The device is as
late as it can be: no event is done before the host has waited for it.

Not modelled: two branches of one capture against each other; several devices; parts of one storage.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor
from torch.cuda._sanitizer import StreamSynchronizations

CUDA = torch.device("cuda", 0)
HOST = -1  # the host's own accesses of pinned memory
function_off = cast(Any, torch._C).DisableTorchFunction
_uses = cast(Callable[[int], int], cast(Any, torch._C)._storage_Use_Count)


class OrderError(AssertionError):
    """An access that nothing orders after an earlier one, or of memory that is gone."""


@dataclass(frozen=True, slots=True)
class Access:
    """By one launch."""

    stream: int
    number: int
    what: str


@dataclass(eq=False, slots=True)
class Memory:
    """One storage on the device, or pinned.

    Attributes:
        storage: kept, so that no other comes to lie here before the device has seen it freed.
        stream: whose launches may take it over once it is freed.
        pool: of the capture that it was allocated in.
        write: the last one.
        reads: since, the last of each stream.
        before: accesses of memory that was freed, which this may be.
        users: streams that its freeing waits for.
        spoilt: why what it holds must not be read.
    """

    storage: Any
    pinned: bool
    stream: int
    pool: Pool | None = None
    write: Access | None = None
    reads: dict[int, Access] = field(default_factory=dict)
    before: list[Access] = field(default_factory=list)
    users: set[int] = field(default_factory=set)
    dead: bool = False
    recorded: bool = False
    spoilt: str = ""
    made: str = field(default_factory=lambda: _where())

    def accesses(self) -> list[Access]:
        return [*self.reads.values(), *([] if self.write is None else [self.write])]


@dataclass(eq=False, slots=True)
class Pool:
    """Memory of captures, which a later one of the same pool may use again."""

    memories: list[Memory] = field(default_factory=list)
    graphs: WeakSet[Graph] = field(default_factory=WeakSet)
    recording: bool = False
    gone: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Place:
    """A tensor as a graph knows it: where it lies, not who holds it."""

    memory: Memory
    dtype: torch.dtype
    layout: tuple[Any, Any, int]

    def tensor(self) -> Tensor:
        size, stride, offset = self.layout
        return torch.empty(0, dtype=self.dtype).set_(self.memory.storage, offset, size, stride)


class Stream:
    """Stands for ``torch.cuda.Stream``."""

    def __init__(self, gpu: Gpu, number: int) -> None:
        self._gpu, self.cuda_stream, self.device = gpu, number, CUDA
        gpu.clocks.create_stream(number)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self) -> Event:
        made = Event(self._gpu)
        made.record(self)
        return made

    def wait_event(self, event: Event) -> None:
        self._gpu.sweep()
        own, theirs = self._gpu.captures.get(self.cuda_stream), event.capture
        if theirs is not None and theirs.ended:
            raise RuntimeError("the event was recorded in a capture that is over")
        if own is not None and theirs is not own:
            own.broken = True
            raise RuntimeError("a capture waits for an event of outside (cudaErrorStreamCaptureIsolation)")
        if theirs is None:
            self._gpu.clocks.stream_wait_for_event(self.cuda_stream, event.number)
        elif own is None:
            self._gpu.captures[self.cuda_stream] = theirs
            theirs.forked.add(self.cuda_stream)
        elif self.cuda_stream == theirs.stream:
            theirs.forked.discard(event.stream)

    def synchronize(self) -> None:
        self._gpu.refuse_waiting("Stream.synchronize")
        self._gpu.may_wait("Stream.synchronize")
        self._gpu.clocks.all_streams_wait_for_stream(self.cuda_stream)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.cuda_stream == self.cuda_stream

    def __hash__(self) -> int:
        return hash(self.cuda_stream)


class Event:
    """Stands for ``torch.cuda.Event``."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu, self.number, self.stream = gpu, next(gpu.numbers), 0
        self.capture: Capture | None = None
        self._known = False
        gpu.clocks.create_event(self.number)

    def record(self, stream: Stream | None = None) -> None:
        self._gpu.sweep()
        self.stream = (self._gpu.current() if stream is None else stream).cuda_stream
        self.capture, self._known = self._gpu.captures.get(self.stream), False
        self._gpu.clocks.record_state(self.number, self.stream)

    def wait(self, stream: Stream | None = None) -> None:
        (self._gpu.current() if stream is None else stream).wait_event(self)

    def query(self) -> bool:
        self._gpu.may_wait("Event.query")
        return self._known

    def synchronize(self) -> None:
        self._gpu.may_wait("Event.synchronize")
        self._gpu.clocks.all_streams_wait_for_event(self.number)
        self._known = True


@dataclass(eq=False)
class Capture:
    """One under way; ``graph``, a :class:`Graph`, is ``None`` once it is over."""

    graph: Any
    stream: int
    pool: Pool
    allocated: list[Memory] = field(default_factory=list)
    forked: set[int] = field(default_factory=set)
    broken: bool = False
    ended: bool = False


class Graph:
    """Stands for ``torch.cuda.CUDAGraph``."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._pool = Pool()
        self._stream = 0
        self.launches: list[Callable[[], None]] = []
        self.workspace: Pool | None = None
        self._reused: list[Memory] = []

    def capture_begin(self, pool: Pool | None = None, **_: Any) -> None:
        self._pool = pool or self._pool
        self._stream = self._gpu.current().cuda_stream
        if not self._stream:
            raise RuntimeError("the default stream cannot be captured")
        self._pool.graphs.add(self)
        self._pool.recording = True
        self._gpu.captures[self._stream] = Capture(self, self._stream, self._pool)

    def capture_end(self) -> None:
        gpu, capture = self._gpu, self._gpu.captures[self._stream]
        capture.ended, capture.graph = True, None  # which events and launches of the capture must not keep
        gpu.captures = {key: other for key, other in gpu.captures.items() if other is not capture}
        gpu.sweep()
        if capture.broken or capture.forked:
            raise RuntimeError("the capture was broken off, or leaves a stream that has not come back to it")
        self._pool.recording = False
        for memory in capture.allocated:
            memory.spoilt = "no replay has filled it yet"
        own = set(map(id, capture.allocated))
        self._reused = [memory for memory in self._pool.memories if memory.dead and id(memory) not in own]

    def replay(self) -> None:
        if self._gpu.capturing():
            raise RuntimeError("a graph is replayed within a capture")
        self._gpu.sweep()
        if self.workspace is not None and self.workspace.gone:
            self._gpu._fail("cuBLAS's workspace was in the memory of a graph that has been dropped")
        self._gpu.launch("memory of the pool's used again", [], self._reused)
        for memory in self._reused:
            memory.spoilt = "another graph of the pool has memory in its place"
        for launch in self.launches:
            launch()

    def __del__(self) -> None:
        self.launches.clear()
        self._gpu.workspaces.pop(self._stream, None)
        if len(self._pool.graphs - {self}) == 0 and not self._pool.recording:
            self._gpu.release(self._pool, self._stream)


class Gpu:
    """The device's state, and what stands for torch's parts.

    Attributes:
        errors: all that were found, those in destructors too.
    """

    def __init__(self) -> None:
        self.clocks = StreamSynchronizations()
        self.numbers = count(1)
        self.memories: dict[int, Memory] = {}
        self.freed: dict[int, list[Access]] = {}
        self.captures: dict[int, Capture] = {}
        self.workspaces: dict[int, Pool | None] = {}  # of cuBLAS's
        self.errors: list[OrderError] = []
        self.num_launches = self.num_replays = 0
        self._lock = threading.RLock()
        self._local = threading.local()
        self._default = Stream(self, 0)
        self._waiting_is_an_error = False
        self.clocks.create_stream(HOST)

    # What is asked of the device.

    def current(self, _: Any = None) -> Stream:
        found: Stream = getattr(self._local, "stream", self._default)
        return found

    def set_stream(self, stream: Stream) -> None:
        self._local.stream = stream

    def draw(self, _: Any = None, **__: Any) -> Stream:
        return Stream(self, next(self.numbers))

    @contextmanager
    def stream(self, stream: Stream | None) -> Iterator[None]:
        before = self.current()
        self.set_stream(before if stream is None else stream)
        try:
            yield
        finally:
            self.set_stream(before)

    def capture(self) -> Capture | None:
        return self.captures.get(self.current().cuda_stream)

    def capturing(self) -> bool:
        return self.capture() is not None

    def may_wait(self, what: str) -> None:
        """The host is about to wait for the device, or to ask it."""
        self.sweep()
        capture = self.capture()
        if capture is not None:
            capture.broken = True
            raise RuntimeError(f"{what} within a capture (cudaErrorStreamCaptureUnsupported)")

    def synchronize(self, _: Any = None) -> None:
        self.may_wait("synchronize")
        self.clocks.sync_all_streams()

    def set_sync_debug_mode(self, mode: str) -> None:
        self._waiting_is_an_error = mode == "error"

    def refuse_waiting(self, what: str) -> None:
        """As torch does for operations and streams; not for the device and events."""
        if self._waiting_is_an_error:
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")

    def host_waits(self, what: str) -> None:
        """For the current stream."""
        self.refuse_waiting(what)
        self.may_wait(what)
        self.clocks.all_streams_wait_for_stream(self.current().cuda_stream)

    # Memory.

    def of(self, tensor: Tensor) -> Memory | None:
        with function_off():
            if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
                return None
            return self.memories.get(tensor.untyped_storage()._cdata)

    def is_pinned(self, tensor: Tensor) -> bool:
        memory = self.of(tensor)
        return memory is not None and memory.pinned

    def is_on(self, tensor: Tensor) -> bool:
        memory = self.of(tensor)
        return memory is not None and not memory.pinned

    def adopt(self, tensor: Tensor, pinned: bool = False) -> Memory | None:
        """Take a tensor's storage, unless it is known, for one allocated now on the current stream."""
        known = self.of(tensor)
        with function_off():
            if known is not None or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
                return known
            storage = tensor.untyped_storage()
        self.sweep()
        made, capture = Memory(storage, pinned, self.current().cuda_stream), self.capture()
        if not pinned and capture is not None:
            made.pool = capture.pool
            capture.allocated.append(made)
            capture.pool.memories.append(made)
        elif not pinned:
            made.before = self._left_behind(made.stream)
        self.memories[storage._cdata] = made
        return made

    def used_by(self, tensor: Tensor, stream: Stream) -> None:
        """Of ``record_stream``."""
        memory = self.of(tensor)
        if memory is not None:
            memory.users.add(stream.cuda_stream)

    def end_allocation(self, _: int, pool: Pool) -> None:
        """What torch's allocator is told after a capture that it could not end."""
        if not pool.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        pool.recording = False

    def _left_behind(self, stream: int) -> list[Access]:
        """Accesses of freed memory that launches of a stream are not ordered after yet."""
        self.freed[stream] = found = self._not_before(self.freed.get(stream, []), stream)
        return found

    def _not_before(self, accesses: Iterable[Access], *streams: int) -> list[Access]:
        """Those that none of these streams comes after."""
        ordered = self.clocks.is_ordered_after
        return [
            a
            for a in accesses
            if a.stream != HOST and not any(ordered(s, a.number, a.stream) for s in streams)
        ]

    def sweep(self) -> None:
        """See what has been freed since."""
        with self._lock:
            gone = [key for key, memory in self.memories.items() if _uses(key) == 1]
            for key in gone:
                memory = self.memories.pop(key)
                memory.dead = True
                if memory.pool is None and not memory.pinned:
                    # Until what its users have been given by now is done, nobody gets it.
                    late = self._not_before(memory.accesses(), memory.stream, *memory.users)
                    self.freed.setdefault(memory.stream, []).extend(late)
                if memory.pool is None and not memory.recorded:
                    memory.storage = None

    def release(self, pool: Pool, stream: int) -> None:
        """The last graph of a pool is gone: its memory is unmapped once the capture's stream is done."""
        self.sweep()
        for memory in pool.memories:
            late = self._not_before(memory.accesses(), stream) if memory.dead else []
            if late:
                self._fail(f"memory of a dropped graph is unmapped, still used by {late[0].what}", False)
            memory.pool = None
        pool.memories.clear()
        pool.gone = True

    def take_workspace(self) -> None:
        """A product of cuBLAS's takes its stream's, which the first there allocates, maybe in a capture."""
        capture = self.capture()
        held = self.workspaces.setdefault(self.current().cuda_stream, capture.pool if capture else None)
        if capture is not None:
            capture.graph.workspace = held

    # Launches.

    def launch(self, what: str, reads: Iterable[Memory], writes: Iterable[Memory], by: int = 0) -> None:
        """Check one launch on the current stream; ``by`` the host where that is given."""
        stream = by or self.current().cuda_stream
        reads, writes = set(reads), set(writes)
        with self._lock:
            number = next(self.numbers)
            self.clocks.update_seq_num(stream, number)
            self.num_launches += 1
            own = Access(stream, number, f"{what} on stream {stream} ({_where()})")
            for memory in reads | writes:
                self._check(memory, own, memory in reads, memory in writes)
                if memory in writes:
                    memory.write, memory.spoilt = own, ""
                    memory.reads = {}
                else:
                    memory.reads[stream] = own

    def _check(self, memory: Memory, own: Access, reads: bool, writes: bool) -> None:
        if memory.dead and memory.pool is None:
            self._fail(f"{own.what} uses memory that has been freed")
        if reads and memory.spoilt:
            self._fail(f"{own.what} reads memory made at {memory.made}, but {memory.spoilt}")
        for late in self._not_before(memory.before, own.stream):
            self._fail(f"{own.what} may use memory that was freed before {late.what} is done")
        memory.before = []
        earlier = memory.accesses() if writes else [a for a in (memory.write,) if a is not None]
        for late in self._not_before(earlier, own.stream):
            does = "writes" if writes else "reads"
            self._fail(f"{own.what} {does} what nothing orders after {late.what}")

    def _fail(self, message: str, now: bool = True) -> None:
        self.errors.append(OrderError(message))
        if now:
            raise self.errors[-1]


def _where() -> str:
    """The innermost lines of recemb's that have come here."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame.f_back is not None and len(found) < 4:
        frame = frame.f_back
        if str(frame.f_globals.get("__name__", "")).startswith("recemb"):
            found.append(f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}")
    return " < ".join(found)
