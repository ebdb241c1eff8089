"""Where the look-ups of a CUDA graph find their batch: as it comes, or prepared ahead by another graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol
from weakref import ref

from recemb_kernels.digit_tree.group import Batch
from recemb_kernels.triton_frame.family import Call
from recemb_kernels.triton_frame.group import TritonGroup
from recemb_kernels.triton_frame.recorder import Recorder
from recemb_kernels.triton_frame.streams import HandOver, copied


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
        """Have the graph's next replay look up this batch."""

    def call(self) -> Call | None:
        """What its launches, recorded or not, start with."""


@dataclass(eq=False)
class Planned:
    """A batch that has been prepared ahead, by a graph that serves one batch at a time.

    Attributes:
        source: what has prepared it.
        batch: the caller's; its memory may be freed once the look-up has waited for what reads it.
        ready: when it is done; ``None`` where there are no streams.
        taken: whether its copy is under way: the next batch may come in its place.
    """

    source: PlannedAhead
    batch: Batch
    ready: HandOver | None
    taken: bool = False

    def wait(self) -> None:
        """Have the current stream wait for it."""
        if self.ready is not None:
            self.ready.take(())


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
        fill(self.batch, batch)

    def call(self) -> Call | None:
        """The plan, where a backward must find it: what it worked out itself would be of its first batch."""
        return self._group.plan(self.batch) if self._keep else None


class PlannedAhead:
    """Batches that a graph of its own sorts and groups, on a stream beside what runs then.

    The look-up takes a copy of what it needs, with which the next batch can be prepared while this one's
    forward and backward read theirs. A batch that comes before the last one is taken is prepared by others.

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
        self._last: ref[Planned] | None = None

        def prepare() -> tuple[Batch, Call, Callable[[], None]]:
            given = copied(batch)
            group.plan(given)  # These addresses may be aligned otherwise, and compile kernels anew.
            (ahead,), replay = beside(lambda: (group.plan(given),))
            replay()
            return given, ahead, replay

        (self._given, self._ahead, self._plan), ready = group.run_beside(prepare)
        if ready is not None:
            ready.take(())
        (self._call, self.batch), self._copy = record(self._copied)
        self._bring()

    @property
    def num_bytes(self) -> int:
        """Of memory that the graph beside holds."""
        return self._beside.num_bytes

    @property
    def busy(self) -> bool:
        """Whether the batch that was prepared last waits for its look-up."""
        last = None if self._last is None else self._last()
        return last is not None and not last.taken

    def prepare(self, batch: Batch) -> Planned:
        """Sort and group a batch of this shape beside what runs now, unless :attr:`busy`."""

        def replay() -> None:
            fill(self._given, batch)
            self._plan()

        _, ready = self._group.run_beside(replay)
        planned = Planned(self, batch, ready)
        self._last = ref(planned)
        return planned

    def bring(self, batch: Batch, planned: Planned | None) -> None:
        """Have the graph's next replay look up what has been prepared."""
        assert planned is not None
        planned.wait()
        self._bring()
        planned.taken = True

    def call(self) -> Call | None:
        """The plan."""
        return self._call

    def leave(self, planned: Planned) -> Call:
        """What has been prepared, for a look-up that does not go through this graph."""
        planned.wait()
        call, _ = self._copied()
        self._group.hold_beside()
        planned.taken = True
        return call

    def _copied(self) -> tuple[Call, Batch]:
        call = self._ahead.copied()
        return call, call.batch

    def _bring(self) -> None:
        self._copy()
        # Also keeps the memory that the copy reads, should this source be dropped before it has.
        self._group.hold_beside()


def fill(own: Batch, given: Batch) -> None:
    """Copy a batch into one of its shape."""
    pairs = ((getattr(own, x), getattr(given, x)) for x in ("ids", "offsets", "weights", "refused"))
    for mine, new in pairs:
        if mine is not None:
            mine.copy_(new)
