"""Look-ups of recurring shapes as CUDA graphs: one launch in place of dozens.

A look-up's kernels are launched for bounds that the host knows, and read all else on the device, so the
same launches serve every batch with as many ids. From the fourth such batch on (the fifth for its backward)
they are replayed from a graph, which reads the batch from memory of its own. Steps read their rates from the
device too, so a schedule changes nothing about a graph. Where batches come prepared ahead, another graph has
done that (``graph_plans.py``). ``RECEMB_CUDA_GRAPHS=0`` keeps every launch eager.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from recemb_kernels.digit_tree.group import Batch
from recemb_kernels.triton_frame.captures import capturing
from recemb_kernels.triton_frame.family import Call
from recemb_kernels.triton_frame.graph_keys import kind_of, shape_of, step_of, who
from recemb_kernels.triton_frame.graph_plans import PlanGraph, Planned, PlannedAhead, PlannedWithin, Source
from recemb_kernels.triton_frame.group import Asked, TritonGroup
from recemb_kernels.triton_frame.recorder import Recorder
from recemb_kernels.triton_frame.streams import NoStreamError
from recemb_kernels.triton_frame.verdict import poll
from recemb_kernels.update import Update

# Launches of a shape that stay eager: kernels are compiled and tuned in them.
_EAGER = 3
_MOST_GRAPHS, _MOST_SHAPES, _MOST_STEPS, _MOST_FAILURES = 8, 256, 4, 3
# Look-ups between two shapes that make room for others: a capture takes as long as dozens of steps.
_PATIENCE = 256
# Gradients that leave a graph are copied; beyond this they are computed outside of it.
_MOST_GRADIENT_BYTES = 2**26


def are_wanted(device: torch.device) -> bool:
    """Whether look-ups on a device are to be captured."""
    return device.type == "cuda" and os.environ.get("RECEMB_CUDA_GRAPHS", "1") != "0"


_Gradients = tuple[list[Tensor | None], Tensor | None, Tensor]


@dataclass(eq=False, slots=True)
class _Backward:
    """One kind of backward of a shape.

    Attributes:
        grad: where it reads the gradient.
        recorded: what it gives, its replay, and tensors that its launches read.
    """

    grad: Tensor
    recorded: tuple[_Gradients, Callable[[], None], list[Tensor]] | None = None


@dataclass(eq=False)
class _Held:
    """One look-up through a graph, whose backward is to come.

    Attributes:
        graph: what it went through.
        turn: the graph's number of look-ups by then.
    """

    graph: _Graph
    turn: int

    def stale(self, parameters: Sequence[Tensor]) -> bool:
        """Whether a later look-up has taken the graph's memory, or the parameters lie elsewhere by now."""
        return self.turn != self.graph.turn or _addresses(parameters) != self.graph.addresses


@dataclass(slots=True)
class _Failures:
    """How many captures of a group have failed since one, with its backward, has last succeeded.

    An object of its own: a graph that referred to its group would keep the memory of both until Python looks
    for cycles, which a GPU that runs full does not wait for.
    """

    count: int = 0

    def note(self, error: RuntimeError) -> None:
        """One more."""
        _stay_eager(error)
        self.count += 1


@dataclass(eq=False, slots=True)
class _Fresh:
    """A batch that has been prepared without a graph, or is to be by its look-up, and not yet looked up."""

    call: Call | None


class _Graph:
    """The look-ups of one shape."""

    def __init__(
        self,
        group: TritonGroup,
        record: Recorder,
        failures: _Failures,
        parameters: Sequence[Tensor],
        batch: Batch,
        keep: bool,
        plans: PlanGraph | None,
    ) -> None:
        self._group, self.record, self._failures = group, record, failures
        self._parameters = list(parameters)
        self.addresses = _addresses(parameters)
        self.source: Source = (
            PlannedWithin(group, batch, keep) if plans is None else PlannedAhead(plans, record, batch)
        )
        self.batch = self.source.batch

        def run() -> tuple[Tensor, Call]:
            return group.run_forward(self._parameters, self.batch, keep=keep, state=self.source.call())

        run()  # These addresses may be aligned otherwise than the batches' before, and compile kernels anew.
        (self._out, self._call), self._replay = record(run)
        # The launches hold addresses: what is remembered must not be freed.
        self._alive = group.remembered()
        self._backwards: dict[Any, _Backward] = {}
        self._user: ref[_Held] | None = None
        self._may_record = True
        self.turn = 0

    @property
    def busy(self) -> bool:
        """Whether a look-up through this graph still waits for its backward."""
        return self._user is not None and self._user() is not None

    @property
    def recorders(self) -> list[Recorder]:
        """Of the graphs that it holds; others may share the second."""
        plans = self.source.plans
        return [self.record] if plans is None else [self.record, plans.record]

    def forward(self, batch: Batch, keep: bool, planned: Planned | None) -> tuple[Tensor, _Held]:
        self.turn += 1
        self.source.bring(batch, planned)
        held = _Held(self, self.turn)
        self._user = ref(held) if keep else None
        return self.again(), held

    def again(self) -> Tensor:
        """Of the same batch, for parameters that have changed."""
        self._replay()
        return self._out.clone()

    def backward(self, grad_out: Tensor, asked: Asked) -> _Gradients:
        try:
            return self._backward(grad_out, asked)
        finally:
            # A second backward of the same look-up sees whether another has been in between.
            self._user = None

    def _backward(self, grad_out: Tensor, asked: Asked) -> _Gradients:
        key = (tuple(map(step_of, asked.updates)), tuple(asked.wanted), asked.want_weights)
        known = self._backwards.get(key)
        if not self._may_record or (known is None and self._too_large(asked)):
            return self._group.run_backward(grad_out, self._parameters, self.batch, self._call, asked)
        fresh = known is None
        if known is None:
            if len(self._backwards) > _MOST_STEPS:  # their optimizers' states have been replaced
                self._backwards.clear()
            own = torch.empty(grad_out.shape, dtype=torch.float32, device=grad_out.device)
            known = self._backwards[key] = _Backward(own)
        grad = known.grad
        grad.copy_(grad_out)

        def run() -> _Gradients:
            return self._group.run_backward(grad, self._parameters, self.batch, self._call, asked)

        if fresh:
            return run()  # The first of a kind compiles kernels, for these very addresses.
        if known.recorded is None:
            try:
                known.recorded = (*self.record(run), self._group.remembered())
                self._failures.count = 0
            except RuntimeError as error:
                self._failures.note(error)
                self._may_record = False
        if known.recorded is None:  # outside of the handler, which holds what the attempt has allocated
            return run()
        (grads, weights, mark), replay, _ = known.recorded
        replay()
        found = [None if grad is None else grad.clone() for grad in grads]
        return found, None if weights is None else weights.clone(), mark

    def _too_large(self, asked: Asked) -> bool:
        size = sum(
            p.numel() * p.element_size()
            for p, want in zip(self._parameters, asked.wanted, strict=True)
            if want
        )
        return size > _MOST_GRADIENT_BYTES


class GraphedGroup:
    """A :class:`TritonGroup` that captures what recurs.

    Args:
        group: the tables.
        recorder: makes what records the launches of one shape.
    """

    def __init__(self, group: TritonGroup, recorder: Callable[[], Recorder]) -> None:
        self._group, self._recorder = group, recorder
        self._lock = Lock()  # of what follows
        self._seen: dict[Any, int] = {}
        self._graphs: dict[Any, _Graph] = {}
        self._patience = 0
        self._refused: Counter[Any] = Counter()  # shapes: twice, and they stay eager
        self._within: set[Any] = set()  # kinds of batches that no graph plans ahead
        self._failures = _Failures()

    @property
    def num_tables(self) -> int:
        """How many tables."""
        return self._group.num_tables

    @property
    def columns(self) -> int:
        """Sum of D over the features."""
        return self._group.columns

    @property
    def alignment(self) -> int:
        """What parameters' addresses are multiples of."""
        return self._group.alignment

    @property
    def graphs(self) -> int:
        """How many shapes are captured."""
        return len(self._graphs)

    def prepare(self, parameters: Sequence[Tensor], batch: Batch) -> _Fresh | Planned:
        """As of the group, by a graph of a kind of batches that has one."""
        if batch.size and batch.ids.numel():
            kind = kind_of(batch)
            with self._lock:
                plans = self._plans(kind)
                within = plans is None and any(key[0] == kind for key in self._graphs)
            if within:
                return _Fresh(None)
            if plans is not None:
                with self._group.on_device():
                    return plans.prepare(batch)
        return _Fresh(self._group.prepare(parameters, batch))

    def forward(
        self, parameters: Sequence[Tensor], batch: Batch, *, keep: bool, state: Any = None
    ) -> tuple[Tensor, Any]:
        """As of the group."""
        poll()
        if isinstance(state, _Held):
            if state.stale(parameters):
                return self._group.forward(parameters, batch, keep=keep)
            return state.graph.again(), state
        if isinstance(state, Call):  # of a look-up without a graph, whose parameters have changed
            return self._group.forward(parameters, batch, keep=keep, state=state)
        graph = self._graph(parameters, batch, keep, isinstance(state, _Fresh | Planned))
        if graph is None:
            return self._group.forward(parameters, batch, keep=keep, state=self._left(batch, state))
        with self._group.on_device():
            return graph.forward(batch, keep, state if isinstance(state, Planned) else None)

    def backward(
        self,
        grad_out: Tensor,
        parameters: Sequence[Tensor],
        batch: Batch,
        state: Any,
        *,
        updates: Sequence[Update | None],
        wanted: Sequence[bool],
        want_weights: bool,
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """As of the group."""
        if isinstance(state, _Held) and state.stale(parameters):
            _, state = self._group.forward(parameters, batch, keep=True)
        if not isinstance(state, _Held):
            return self._group.backward(
                grad_out,
                parameters,
                batch,
                state,
                updates=updates,
                wanted=wanted,
                want_weights=want_weights,
            )
        asked = Asked(updates, wanted, want_weights, self._group.begin_backward(updates))
        with self._group.on_device():
            grads, weights, mark = state.graph.backward(grad_out, asked)
        self._group.end_backward(updates, mark)
        return grads, weights

    def _graph(self, parameters: Sequence[Tensor], batch: Batch, keep: bool, prepared: bool) -> _Graph | None:
        """The graph of a shape that has recurred, unless an earlier look-up is not done with it."""
        if not (batch.size and batch.ids.numel()) or capturing():
            return None
        shape = shape_of(parameters, batch, keep)
        key = (*shape, who(batch.ids.device))
        with self._lock:
            self._patience -= 1
            if not self._recurs(shape):
                return None
            known = self._graphs.pop(key, None)
            ahead = prepared and shape[0] not in self._within and self._group.plans(keep)
            if known is not None and ahead and known.source.plans is None and not known.busy:
                known = known if self._patience > 0 else None
            if known is None:
                return self._capture(key, parameters, batch, ahead)
            self._graphs[key] = known  # the last used is the last to go
            return known if self._fits(key) and not known.busy else None

    def _left(self, batch: Batch, state: _Fresh | Planned | None) -> Call | None:
        """What has been prepared, for a look-up that no graph is free for."""
        if not isinstance(state, Planned):
            return None if state is None else state.call
        with self._lock:
            plans = self._plans(kind_of(batch))
        with self._group.on_device():
            return None if plans is None else plans.leave(state)

    def _plans(self, kind: Any) -> PlanGraph | None:
        """The graph that plans a kind of batches; it lives as long as one that looks them up."""
        of_kind = (graph.source.plans for key, graph in self._graphs.items() if key[0] == kind)
        return next((plans for plans in of_kind if plans is not None), None)

    def _recurs(self, shape: Any) -> bool:
        """Whether look-ups of a shape go through graphs by now; counts them."""
        if self._hopeless() or self._refused[shape] > 1:
            return False
        if len(self._seen) >= _MOST_SHAPES:
            self._seen.clear()
        self._seen[shape] = self._seen.get(shape, 0) + 1
        return self._seen[shape] > _EAGER

    def _capture(self, key: Any, parameters: Sequence[Tensor], batch: Batch, ahead: bool) -> _Graph | None:
        kind, keep, *_ = key
        # Tables that have been replaced must not stay in memory for their graphs' sake.
        for other in [other for other in self._graphs if other[-2] != key[-2]]:
            del self._graphs[other]
        if self._patience > 0:
            return None
        if len(self._graphs) >= _MOST_GRAPHS:
            self._let_go()
        # The graphs' memory serves look-ups in inference mode and others.
        with self._group.on_device(), torch.inference_mode(False), torch.no_grad():
            try:
                recorder = self._recorder()
            except NoStreamError:
                self._patience = _PATIENCE  # others' graphs may be gone by then
                return None
            plans = self._plans(kind) or self._plan_graph(kind, batch) if ahead else None
            try:
                made = _Graph(self._group, recorder, self._failures, parameters, batch, keep, plans)
            except RuntimeError as error:
                made = None
                if plans is None:
                    self._failures.note(error)
                    self._refused[key[:-1]] += 2
                    for other in [other for other in self._graphs if other[:-1] == key[:-1]]:
                        del self._graphs[other]  # another thread's, which would not be used any more
                    self._hopeless()
                else:
                    self._plan_within(kind, error)
        if made is None:
            return None
        if not keep:
            self._failures.count = 0
        self._graphs[key] = made
        return made if self._fits(key) else None

    def _hopeless(self) -> bool:
        """Whether so many captures have failed that there are no graphs any more."""
        if self._failures.count < _MOST_FAILURES:
            return False
        self._graphs.clear()
        return True

    def _fits(self, key: Any) -> bool:
        """Whether the graph used last may stay; others make room for it."""
        graph = self._graphs[key]
        most = graph.record.most_bytes
        if graph.source.plans is not None and _num_bytes([graph]) > most:  # it may fit without
            del self._graphs[key]
            self._within.add(key[0])
            return False
        while _num_bytes(self._graphs.values()) > most:
            alone = len(self._graphs) == 1
            self._let_go()
            if alone:  # another thread's memory may have been taken for its own, once
                self._refused[key[:-1]] += 1
                return False
        return True

    def _plan_graph(self, kind: Any, batch: Batch) -> PlanGraph | None:
        try:
            return PlanGraph(self._group, self._recorder(), batch)
        except NoStreamError:
            self._patience = _PATIENCE  # look-ups sort their batches until then
        except RuntimeError as error:
            self._plan_within(kind, error)
        return None

    def _plan_within(self, kind: Any, error: RuntimeError) -> None:
        message = "recemb: look-ups sort their batches, as no CUDA graph could be captured that does it ahead"
        warnings.warn(f"{message} ({error})", stacklevel=3)
        self._within.add(kind)

    def _let_go(self) -> None:
        """Drop the graph that has not been used for longest, and capture none in its place for a while."""
        oldest = next(iter(self._graphs))
        del self._graphs[oldest]
        self._seen[oldest[:-1]] = 0
        self._patience = _PATIENCE


def _addresses(parameters: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(parameter.data_ptr() for parameter in parameters)


def _num_bytes(graphs: Iterable[_Graph]) -> int:
    """Of memory that graphs hold; several may share one that plans their batches."""
    recorders = {id(record): record for graph in graphs for record in graph.recorders}
    return sum(record.num_bytes for record in recorders.values())


def _stay_eager(error: RuntimeError) -> None:
    message = f"recemb: look-ups stay eager, as they could not be captured in a CUDA graph ({error})"
    warnings.warn(message, stacklevel=3)
