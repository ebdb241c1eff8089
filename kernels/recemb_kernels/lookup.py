"""Look-ups in eager mode: one call for all tables, each with its own optimizer in the backward."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import compress
from threading import Lock
from typing import Any, Generic, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from recemb_kernels.digit_tree.group import Batch, ChangedError, Group, driver
from recemb_kernels.digit_tree.step import CompiledLookup, compiled_lookup, loaded, step_module
from recemb_kernels.gather_op import GatherOp, PooledGroup, make_batch, make_group
from recemb_kernels.native import STEP, attempt
from recemb_kernels.storage import Stored
from recemb_kernels.update import Step, is_stepped

_T = TypeVar("_T")
# A batch's ids [L], offsets [F * B + 1], weights [L] as autograd knows them or ``None``, B, and on a GPU the
# mark of a batch that no weight may change for (:class:`~recemb_kernels.digit_tree.group.Batch`).
Given: TypeAlias = tuple[Tensor, Tensor, Tensor | None, int, Tensor | None]


@dataclass(frozen=True)
class TableShape:
    """One table: the op whose kernel serves it, and its shape in that op's terms.

    ``stored`` says how its parameters are stored for inference, on the CPU; none when they are float32.
    """

    op: GatherOp[Any]
    shape: Any
    stored: Stored = ()


def available(shapes: Sequence[TableShape], device: torch.device, trains: bool) -> list[bool]:
    """Whether each shape's kernel can be had here, compiled side by side for the CPU.

    What cannot is warned about once, and not tried again. A GPU's kernels are compiled when they first run.

    Args:
        shapes: the tables.
        device: where they are looked up.
        trains: whether the look-up that trains will be asked for, which takes longest to compile.
    """
    if device.type == "cuda":
        return [attempt(f"{shape.op.name} on GPU", shape.op.family) is not None for shape in shapes]
    # Compilers run as processes of their own, so threads are enough to use every core.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        step = pool.submit(step_module) if trains else None
        found = list(pool.map(_compiled, shapes))
    if step is not None and any(found):
        attempt(STEP, step.result, instead="from Python")
    return found


def _compiled(shape: TableShape) -> bool:
    kernel = partial(shape.op.stored_kernel, shape.shape, shape.stored)
    what = (shape.shape, *shape.stored) if shape.stored else shape.shape
    # And the driver, which runs them all.
    return attempt(shape.op.name, lambda: (kernel(), driver()), what) is not None


@dataclass(frozen=True, eq=False)
class Lookup:
    """What is fixed about a group of tables and the features that are pooled in them.

    Args:
        tables: the tables, of any ops.
        features: (table, is mean, key base) per feature, flat.
        refusal: makes the error that is raised in place of the kernels' when nothing has changed: in place of
            a FloatingPointError of a backward with an update whose gradient is not finite, and of a
            MemoryError.
        micro_batch_rows: distinct rows that are computed at once; the device's default when ``None``.
        joins: per feature the earlier one whose bags it holds the rest of, or -1; empty for none. On the CPU
            rows of both are added up in that one's columns.
    """

    tables: tuple[TableShape, ...]
    features: tuple[int, ...]
    refusal: Callable[[Exception], Exception]
    micro_batch_rows: int | None = None
    joins: tuple[int, ...] = ()

    @cached_property
    def _groups(self) -> dict[tuple[torch.device, tuple[torch.dtype, ...]], PooledGroup]:
        return {}

    def group(self, parameters: Sequence[Sequence[Tensor]]) -> PooledGroup:
        """The tables as a group, for the device and types of their parameters."""
        device, dtypes = parameters[0][0].device, tuple(table[0].dtype for table in parameters)
        known = self._groups.get((device, dtypes))
        if known is None:
            tables = [(table.op, table.shape, table.stored) for table in self.tables]
            not_finite = partial(self.refusal, FloatingPointError())
            known = make_group(
                tables, self.features, device, dtypes, not_finite, self.micro_batch_rows, joins=self.joins
            )
            self._groups[device, dtypes] = known
        return known

    def bind(self, parameters: Sequence[Sequence[Tensor]], steps: Sequence[Step | None]) -> Bound:
        """The look-up of such parameters with these steps.

        Args:
            parameters: each table's, contiguous: float32 or as ``stored`` says on CPU, float32, bfloat16 or
                float16 on GPU.
            steps: per table, the optimizer step to take in the backward in place of gradients.

        Raises:
            KernelUnavailableError: no native kernel can be compiled here.
        """
        pairs = zip(parameters, steps, strict=True)
        stepped = [is_stepped(step, k) for table, step in pairs for k in range(len(table))]
        asking = [parameter.requires_grad for table in parameters for parameter in table]
        wanted = [ask and not step for ask, step in zip(asking, stepped, strict=True)]
        group = self.group(parameters)
        return Bound(
            group, self.refusal, list(steps), stepped, wanted, self._in_cpp(group, steps, stepped, wanted)
        )

    def _in_cpp(
        self, group: PooledGroup, steps: Sequence[Step | None], stepped: list[bool], wanted: list[bool]
    ) -> CompiledLookup | None:
        """The same without Python; not on a GPU, nor before anything trains: it takes a while to compile."""
        if not isinstance(group, Group) or not (any(stepped) or any(wanted) or loaded):
            return None
        # Not the look-up itself: nothing that is given to C++ is to hold the tables.
        refusal = partial(_refused, self.refusal, group)
        make = partial(compiled_lookup, group, steps, stepped, wanted, refusal, _guarded)
        return attempt(STEP, make, instead="from Python")

    def compiled(
        self,
        parameters: Sequence[Sequence[Tensor]],
        ids: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
        batch: int,
    ) -> Tensor:
        """The same as a torch op, for tables of one op: what torch.export can take."""
        op = self.tables[0].op
        flat = [parameter for table in parameters for parameter in table]
        code = op.encode([table.shape for table in self.tables])
        return op(flat, ids, offsets, weights, batch, code, self.features)


@dataclass(slots=True, eq=False)
class Bound:
    """A look-up of parameters on one device and of one type, with or without gradients and steps.

    Args:
        group: the tables.
        refusal: as of the look-up.
        steps: per table.
        stepped: per parameter, whether it takes its table's step.
        wanted: per parameter, whether its gradient is written out.
        compiled: the same look-up in C++, where there is one.
    """

    group: PooledGroup
    refusal: Callable[[Exception], Exception]
    steps: list[Step | None]
    stepped: list[bool]
    wanted: list[bool]
    compiled: CompiledLookup | None

    def __call__(self, stored: list[Tensor], given: Given, ahead: Ahead | None = None) -> Tensor:
        """Pool a batch of F features, [B, sum of D over the features].

        Args:
            stored: the parameters, table by table.
            given: the bags, their ids already checked against the tables' rows.
            ahead: what :meth:`prepare` has made of this batch.
        """
        ids, offsets, weights, samples, refused = given
        try:
            state = None if ahead is None else ahead.state_for(self.group)
            if self.compiled is None or _autograd_is_compiled():
                batch = make_batch(ids, offsets, weights, samples, refused)
                return self._from_python(stored, batch, weights, state)
        except MemoryError as error:
            raise self.refusal(error) from None
        prepared = 0 if state is None else state.hand_over()
        return self.compiled.look_up(stored, ids, offsets, weights, samples, prepared)

    def _from_python(
        self, stored: Sequence[Tensor], batch: Batch, weights: Tensor | None, state: Any
    ) -> Tensor:
        if not torch.is_grad_enabled():
            return self.group.forward(stored, batch, keep=False, state=state)[0]
        changing = list(compress(stored, self.stepped))
        # Without an update, whether a gradient is wanted is for the parameters and weights to say.
        anchor = _ANCHOR if changing else None
        call = _Call(self, stored, batch, changing, state, _kinds(stored))
        return _pool(call, anchor, weights, *compress(stored, self.wanted))

    def prepare(self, stored: Sequence[Tensor], given: Callable[[], Given]) -> Ahead:
        """Sort and group a batch beside what runs now: in a thread, or on a stream of the GPU's own."""

        def prepare() -> Any:
            return self.group.prepare(stored, make_batch(*given()))

        if stored[0].is_cpu:
            return Ahead(self.group, beside(prepare))
        made = prepare()
        return Ahead(self.group, lambda: made)


@dataclass(slots=True, eq=False)
class _Call:
    """One look-up: its parameters, those that its backward changes, and what is known of its batch.

    ``kinds`` says of what type, size and layout the parameters were.
    """

    bound: Bound
    stored: Sequence[Tensor]
    batch: Batch
    changing: list[Tensor]
    state: Any
    kinds: list[object]
    lock: Any = field(default_factory=Lock)


@dataclass(slots=True, eq=False)
class Ahead:
    """A batch that is being prepared for its look-up, which it serves once.

    Args:
        group: the tables it is prepared for.
        wait: gives what has been prepared, when it is ready.
    """

    group: PooledGroup
    wait: Callable[[], Any]

    def state_for(self, group: PooledGroup) -> Any:
        """What ``group`` needs of the batch, or ``None`` when the tables have changed device or type."""
        return self.wait() if group is self.group else None


def beside(run: Callable[[], _T]) -> Callable[[], _T]:
    """Have the thread that prepares batches run something after what it has been given before.

    Returns:
        What waits for its result.
    """
    return _Job(run)


class _Job(Generic[_T]):
    """What the thread beside has been given to run; a call waits for its result.

    A forked child has no such thread: what was done by the fork is there, and all else the child runs itself
    when it asks for it. Of what that thread may have held then, a lock of its future's say, nothing is
    touched.
    """

    def __init__(self, run: Callable[[], _T]) -> None:
        self._run: Callable[[], _T] | None = run
        self._made: list[_T] = []
        self._training = torch.is_grad_enabled()
        self._thread = _beside()
        self._future = self._thread.submit(self._make)

    def __call__(self) -> _T:
        if not self._made:
            if self._thread is _beside():
                self._future.result()
            else:
                self._make()
        return self._made[0]

    def _make(self) -> None:
        assert self._run is not None
        with torch.set_grad_enabled(self._training):
            self._made.append(self._run())
        self._run = None  # it may hold what holds this


@cache
def _beside() -> ThreadPoolExecutor:
    # One: on two cores a second one would only slow the step down.
    return ThreadPoolExecutor(1, thread_name_prefix="recemb-prefetch")


# A child has no thread that the parent's would wait for.
os.register_at_fork(after_in_child=_beside.cache_clear)


class _Pool(torch.autograd.Function):
    """One autograd node for all tables.

    Parameters with a fused update are no inputs: hooks on their gradients do not fire, and their change in
    the backward is not taken for a mistake. ``_ANCHOR`` is there so that a backward comes even without any.
    As with FBGEMM's tables, **each look-up is a step of its own**: a table looked up twice before the
    backward is stepped twice, the second time with gradients at the weights that the first step left, and
    ``torch.autograd.grad`` of whatever the node has as inputs steps the others too.
    """

    @staticmethod
    def forward(
        ctx: Any, call: _Call, anchor: Tensor | None, weights: Tensor | None, *free: Tensor
    ) -> Tensor:
        batch = call.batch
        out, call.state = call.bound.group.forward(call.stored, batch, keep=True, state=call.state)
        ctx.call, ctx.versions = call, [parameter._version for parameter in call.changing]
        # Read again in the backward: autograd then complains when one was changed in place.
        ctx.save_for_backward(
            batch.ids, batch.offsets, *(() if batch.weights is None else (batch.weights,)), *free
        )
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return _Pool.step(ctx, grad_out)
        # With `create_graph`. torch's `once_differentiable` would let a second derivative be silently 0 where
        # `grad_out` is constant, as it is of a loss that is linear in the rows.
        with torch.no_grad():
            grads = _Pool.step(ctx, grad_out)
        return tuple(_guarded(grads, [grad_out, *ctx.saved_tensors]))

    @staticmethod
    def step(ctx: Any, grad_out: Tensor) -> Any:
        """The backward, of which there is no derivative."""
        call: _Call | None = ctx.call
        # One thread at a time: they would share its memory.
        with nullcontext() if call is None else call.lock:
            _ = ctx.saved_tensors
            if ctx.call is None:  # of another thread, which is about to leave
                raise RuntimeError("trying to backward through the graph a second time")
            return _Pool.step_of(ctx, ctx.call, grad_out)

    @staticmethod
    def step_of(ctx: Any, call: _Call, grad_out: Tensor) -> Any:
        """The backward of a call."""
        bound, stored, batch = call.bound, call.stored, call.batch
        if call.kinds != _kinds(stored):
            raise bound.refusal(ChangedError())
        if grad_out.is_sparse:
            grad_out = grad_out.to_dense()
        updates = [None if step is None else step.make() for step in bound.steps]
        try:
            if ctx.versions != [parameter._version for parameter in call.changing]:
                # A step has been taken since the forward: its products belong to weights that are gone.
                bound.group.forward(stored, batch, keep=True, state=call.state)
            grads, grad_weights = bound.group.backward(
                grad_out.resolve_neg(),
                stored,
                batch,
                call.state,
                updates=updates,
                wanted=bound.wanted,
                want_weights=ctx.needs_input_grad[2],
            )
        except (FloatingPointError, MemoryError, ChangedError) as error:
            raise bound.refusal(error) from None
        if call.changing:
            torch.autograd.graph.increment_version(call.changing)
        if not _keeps_graph():
            # As torch does with what is saved: whoever keeps the loss keeps the node.
            ctx.call = None
        return None, None, grad_weights, *compress(grads, bound.wanted)


class _Once(torch.autograd.Function):
    """The first ``count`` of some tensors, as of all of them; going back through it is an error."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        # Not views, which could not be changed in place, as gradients are.
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "a look-up cannot be differentiated twice: its backward is a kernel; take second derivatives "
            "with respect to other parameters, or of pooled embeddings that are detached"
        )


def _kinds(parameters: Sequence[Tensor]) -> list[object]:
    return [(each.dtype, each.shape, each.is_contiguous()) for each in parameters]


def _guarded(grads: Sequence[Tensor | None], of: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients that hang on what they were made of, and cannot be differentiated."""
    made = [grad for grad in grads if grad is not None]
    guarded = iter(_once(len(made), *made, *of) if made else ())
    return [None if grad is None else next(guarded) for grad in grads]


def _autograd_is_compiled() -> bool:
    """Whether backwards are compiled, which a node in C++ would have to be made for."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and module.compiled_autograd_enabled


def _refused(refusal: Callable[[Exception], Exception], group: Group, *what: int) -> Exception:
    return refusal(group.error(*what))


_keeps_graph: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph
_pool = cast(Callable[..., Tensor], cast(Any, _Pool).apply)
_once = cast(Callable[..., tuple[Tensor, ...]], cast(Any, _Once).apply)
_ANCHOR = torch.empty(0, requires_grad=True, dtype=torch.float32, device="cpu")
