"""Where the look-ups of a CUDA graph find their batch: as it comes, or planned ahead by another graph."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from threading import Lock
from typing import Protocol, TypeVar
from weakref import ref

from recemb_kernels.digit_tree.group import Batch
from recemb_kernels.triton_frame.family import Call
from recemb_kernels.triton_frame.group import TritonGroup
from recemb_kernels.triton_frame.recorder import Recorder
from recemb_kernels.triton_frame.streams import HandOver, copied

_T = TypeVar("_T")


@dataclass(eq=False)
class Planned:
    """A batch handed to a :class:`PlanGraph`; refers to no graph, whose memory it would keep.

    Attributes:
        batch: the caller's.
        given: what its ids come from; ``None`` where there are no streams, as below.
        ready: when it is planned, or was: another batch may have come in its place.
        displaced: whether one has, after which it comes first, but once: it may never be looked up.
    """

    batch: Batch
    given: HandOver | None
    ready: HandOver | None = None
    displaced: bool = False


class PlanGraph:
    """A graph that sorts and groups batches of one shape, on a stream beside what runs then.

    Its memory holds one plan at a time, which the look-up copies, so that the next batch can be planned while
    the look-up's forward and backward read theirs. Batches beyond that wait for their turn.

    Args:
        group: the tables.
        record: records it.
        batch: one of that shape.

    Raises:
        RuntimeError: it cannot be captured.
    """

    def __init__(self, group: TritonGroup, record: Recorder, batch: Batch) -> None:
        self._group, self.record = group, record
        self._lock = Lock()  # of what follows; another thread may prepare the next batch
        self._last: ref[Planned] | None = None
        self._waiting: deque[ref[Planned]] = deque()

        def make() -> tuple[Batch, Call, Callable[[], None]]:
            own = Batch(batch.ids.clone(), batch.offsets.clone(), None, batch.size)
            group.plan(own)  # These addresses may be aligned otherwise, and compile kernels anew.
            (plan,), replay = record(lambda: (group.plan(own),))
            return own, plan, replay

        (self._own, self._plan, self._replay), _ = group.run_beside(make)

    def copied(self) -> Call:
        """The plan, of a batch without weights, in memory of its own."""
        return self._plan.copied()

    def prepare(self, batch: Batch) -> Planned:
        """Plan a batch beside what runs now, after those that wait already."""
        planned = Planned(batch, HandOver.now(batch.ids.device))
        with self._lock:
            self._waiting.append(ref(planned))
            self._begin()
        return planned

    def take(self, batch: Batch, planned: Planned | None, take: Callable[[], None]) -> None:
        """Have ``take`` copy a batch's plan, made now if it is not the one in hand; then begin the next."""
        with self._lock:
            if planned is None or planned is not self._in_hand():
                planned = self._in_turn(batch, planned)
            self._give(planned, take)

    def leave(self, planned: Planned) -> Call | None:
        """A copy for a look-up that is not replayed, if the plan is in hand."""
        with self._lock:
            return self._give(planned, self.copied) if planned is self._in_hand() else None

    def _in_hand(self) -> Planned | None:
        """Whose plan waits for its look-up; none if that was dropped."""
        return None if self._last is None else self._last()

    def _give(self, planned: Planned, take: Callable[[], _T]) -> _T:
        if planned.ready is not None:
            planned.ready.take(())
        made = take()
        # Also keeps the memory that is copied, should this graph be dropped before it has been.
        self._group.hold_beside()
        self._last = None
        self._begin()
        return made

    def _begin(self) -> None:
        """Plan what has waited for longest, unless there is a plan in hand."""
        self._waiting = deque(waits for waits in self._waiting if waits() is not None)
        while self._waiting and self._in_hand() is None:
            following = self._waiting.popleft()()
            if following is not None:
                self._run(following)

    def _in_turn(self, batch: Batch, planned: Planned | None) -> Planned:
        """Plan a batch whose look-up has come, which ``planned`` has waited for."""
        self._waiting = deque(waits for waits in self._waiting if waits() is not planned)
        held = self._in_hand()
        if held is not None and not held.displaced:
            held.displaced = True
            self._waiting.appendleft(ref(held))
        planned = Planned(batch, HandOver.now(batch.ids.device))
        self._run(planned)
        return planned

    def _run(self, planned: Planned) -> None:
        self._last = None  # should this be interrupted

        def run() -> None:
            if planned.given is not None:
                planned.given.take(planned.batch)
            self._own.ids.copy_(planned.batch.ids)
            self._own.offsets.copy_(planned.batch.offsets)
            self._replay()

        _, planned.ready = self._group.run_beside(run)
        self._last = ref(planned)


class Source(Protocol):
    """What brings batches of one shape to a look-up's graph.

    Attributes:
        batch: where the graph reads them.
        plans: the graph that plans them, or ``None``.
    """

    batch: Batch
    plans: PlanGraph | None

    def bring(self, batch: Batch, planned: Planned | None) -> None:
        """Have the graph's next replay look up this batch, which may have been planned."""

    def call(self) -> Call | None:
        """What the graph's launches start with, recorded or not."""


class PlannedWithin:
    """Batches that come as they are: the look-up's graph sorts and groups them.

    Args:
        group: the tables.
        batch: one of them.
        keep: whether a backward follows.
    """

    def __init__(self, group: TritonGroup, batch: Batch, keep: bool) -> None:
        self._group, self._keep = group, keep
        self.plans: PlanGraph | None = None
        self.batch = copied(batch)

    def bring(self, batch: Batch, planned: Planned | None) -> None:
        """Have the graph's next replay look up this batch."""
        _fill(self.batch, batch, ("ids", "offsets", "weights", "refused"))

    def call(self) -> Call | None:
        """The plan, where a backward must find it: what it worked out itself would be of its first batch."""
        return self._group.plan(self.batch) if self._keep else None


class PlannedAhead:
    """Batches that another graph plans, whose plan comes as a copy.

    Args:
        plans: that graph.
        record: records the copy, into the memory of the look-up's graph.
        batch: one of them.

    Raises:
        RuntimeError: the copy cannot be captured.
    """

    def __init__(self, plans: PlanGraph, record: Recorder, batch: Batch) -> None:
        self.plans: PlanGraph | None = plans
        weights, refused = copied(batch.weights), copied(batch.refused)

        def take() -> tuple[Call, Batch]:
            call = plans.copied()
            return call, replace(call.batch, weights=weights, refused=refused)

        (self._call, self.batch), self._take = record(take)
        self.bring(batch, None)

    def bring(self, batch: Batch, planned: Planned | None) -> None:
        """Have the graph's next replay look up this batch, its weights as they are now."""
        assert self.plans is not None
        self.plans.take(batch, planned, self._take)
        _fill(self.batch, batch, ("weights", "refused"))

    def call(self) -> Call:
        """The plan; what a look-up adds to it is its own."""
        made = copy(self._call)
        made.kept = dict(self._call.kept)
        return made


def _fill(own: Batch, given: Batch, names: Sequence[str]) -> None:
    """Copy these tensors of a batch into one of its shape."""
    for mine, new in ((getattr(own, name), getattr(given, name)) for name in names):
        if mine is not None:
            mine.copy_(new)
