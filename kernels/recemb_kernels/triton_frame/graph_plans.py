"""Where the look-ups of a CUDA graph find their batch: as it comes, or prepared ahead by another graph."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from threading import Lock
from typing import Protocol
from weakref import ref

from recemb_kernels.digit_tree.group import Batch
from recemb_kernels.triton_frame.family import Call
from recemb_kernels.triton_frame.group import TritonGroup
from recemb_kernels.triton_frame.recorder import Recorder
from recemb_kernels.triton_frame.streams import HandOver, copied


@dataclass(eq=False)
class Planned:
    """A batch that a graph prepares; refers to none, whose memory it would keep.

    Attributes:
        batch: the caller's.
        ready: when it is done; ``None`` where there are no streams.
    """

    batch: Batch
    ready: HandOver | None

    def wait(self) -> None:
        """Have the current stream wait for it, and keep the memory of what it reads until then."""
        if self.ready is not None:
            self.ready.take(self.batch)


class Source(Protocol):
    """What brings batches of one shape to a graph.

    Attributes:
        batch: where the graph reads them.
        num_bytes: of memory that graphs of its own hold.
    """

    batch: Batch

    @property
    def num_bytes(self) -> int: ...

    def bring(self, batch: Batch, planned: Planned | None) -> None:
        """Have the graph's next replay look up this batch, of which ``planned`` has been prepared."""

    def call(self) -> Call | None:
        """What the graph's launches start with, recorded or not."""


class PlannedWithin:
    """Batches that come as they are: the graph sorts and groups them.

    Args:
        group: the tables.
        batch: one of them.
        keep: whether a backward follows.
    """

    num_bytes = 0

    def __init__(self, group: TritonGroup, batch: Batch, keep: bool) -> None:
        self._group, self._keep = group, keep
        self.batch = copied(batch)

    def bring(self, batch: Batch, planned: Planned | None) -> None:
        """Have the graph's next replay look up this batch."""
        _fill(self.batch, batch)

    def call(self) -> Call | None:
        """The plan, where a backward must find it: what it worked out itself would be of its first batch."""
        return self._group.plan(self.batch) if self._keep else None


class PlannedAhead:
    """Batches that a graph of its own sorts and groups, on a stream beside what runs then.

    The look-up takes a copy of what it needs, so that the next batch can be prepared while this one's forward
    and backward read theirs. One batch is prepared at a time: another look-up takes its place.

    Args:
        group: the tables.
        beside: records that graph.
        record: records the copy, into the memory of the look-up's graph.
        batch: one of them.

    Raises:
        RuntimeError: one of both cannot be captured.
    """

    def __init__(self, group: TritonGroup, beside: Recorder, record: Recorder, batch: Batch) -> None:
        self._group, self._beside = group, beside
        self._lock = Lock()  # of which batch is in the graph's memory; another thread may prepare the next
        self._last: ref[Planned] | None = None

        def prepare() -> tuple[Batch, Call, Callable[[], None]]:
            given = copied(batch)
            group.plan(given)  # These addresses may be aligned otherwise, and compile kernels anew.
            (ahead,), replay = beside(lambda: (group.plan(given),))
            replay()
            return given, ahead, replay

        (self._given, self._ahead, self._plan), ready = group.run_beside(prepare)
        Planned(batch, ready).wait()

        def take() -> tuple[Call, Batch]:
            call = self._ahead.copied()
            return call, call.batch

        (self._call, self.batch), self._take = record(take)
        self._bring()

    @property
    def num_bytes(self) -> int:
        """Of memory that the graph beside holds."""
        return self._beside.num_bytes

    def prepare(self, batch: Batch) -> Planned | None:
        """Sort and group a batch of this shape beside what runs now; ``None`` while another waits."""
        with self._lock:
            last = None if self._last is None else self._last()
            return self._prepare(batch) if last is None else None

    def bring(self, batch: Batch, planned: Planned | None) -> None:
        """Have the graph's next replay look up this batch, prepared now if it is not."""
        with self._lock:
            if planned is None or self._last is None or self._last() is not planned:
                planned = self._prepare(batch)
            planned.wait()
            self._bring()
            self._last = None

    def call(self) -> Call:
        """The plan; what a look-up adds to it is its own."""
        made = copy(self._call)
        made.kept = dict(self._call.kept)
        return made

    def _prepare(self, batch: Batch) -> Planned:
        def replay() -> None:
            _fill(self._given, batch)
            self._plan()

        _, ready = self._group.run_beside(replay)
        planned = Planned(batch, ready)
        self._last = ref(planned)
        return planned

    def _bring(self) -> None:
        self._take()
        # Also keeps the memory that is copied, should this source be dropped before it has been.
        self._group.hold_beside()


def _fill(own: Batch, given: Batch) -> None:
    """Copy a batch into one of its shape."""
    pairs = ((getattr(own, x), getattr(given, x)) for x in ("ids", "offsets", "weights", "refused"))
    for mine, new in pairs:
        if mine is not None:
            mine.copy_(new)
