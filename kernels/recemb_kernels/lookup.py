"""Look-ups in eager mode: one call for all tables, each with its own optimizer in the backward."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recemb_kernels.digit_tree.group import Batch
from recemb_kernels.gather_op import GatherOp, PooledGroup, make_group
from recemb_kernels.native import attempt
from recemb_kernels.update import Step, is_stepped


@dataclass(frozen=True)
class TableShape:
    """One table: the op whose kernel serves it, and its shape in that op's terms."""

    op: GatherOp[Any]
    shape: Any


def available(shapes: Sequence[TableShape], device: torch.device) -> list[bool]:
    """Whether each shape's kernel can be had here, compiled side by side for the CPU.

    What cannot is warned about once, and not tried again. A GPU's kernels are compiled when they first run.
    """
    if device.type == "cuda":
        return [attempt(f"{shape.op.name} on GPU", shape.op.family) is not None for shape in shapes]
    # Compilers run as processes of their own, so threads are enough to use every core.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(_compiled, shapes))


def _compiled(shape: TableShape) -> bool:
    return attempt(shape.op.name, lambda: shape.op.kernel(shape.shape), shape.shape) is not None


@dataclass(frozen=True, eq=False)
class Lookup:
    """What is fixed about a group of tables and the features that are pooled in them.

    Args:
        tables: the tables, of any ops.
        features: (table, is mean, key base) per feature, flat.
        refusal: makes the error that a backward with an update raises, nothing changed, when the gradient is
            not finite.
        micro_batch_rows: distinct rows that are computed at once; the device's default when ``None``.
    """

    tables: tuple[TableShape, ...]
    features: tuple[int, ...]
    refusal: Callable[[], Exception]
    micro_batch_rows: int | None = None

    @cached_property
    def _groups(self) -> dict[tuple[torch.device, tuple[torch.dtype, ...]], PooledGroup]:
        return {}

    def group(self, parameters: Sequence[Sequence[Tensor]]) -> PooledGroup:
        """The tables as a group, for the device and types of their parameters."""
        device, dtypes = parameters[0][0].device, tuple(table[0].dtype for table in parameters)
        known = self._groups.get((device, dtypes))
        if known is None:
            tables = [(table.op, table.shape) for table in self.tables]
            known = make_group(tables, self.features, device, dtypes, self.refusal, self.micro_batch_rows)
            self._groups[device, dtypes] = known
        return known

    def __call__(
        self,
        parameters: Sequence[Sequence[Tensor]],
        batch: Batch,
        weights: Tensor | None,
        steps: Sequence[Step | None],
        ahead: Ahead | None = None,
    ) -> Tensor:
        """Pool a batch of F features, [B, sum of D over the features].

        Args:
            parameters: each table's, contiguous: float32 on CPU, float32, bfloat16 or float16 on GPU.
            batch: the bags, their ids already checked against the tables' rows.
            weights: the batch's weights as autograd knows them.
            steps: per table, the optimizer step to take in the backward in place of gradients.
            ahead: what :meth:`prepare` has made of this batch.

        Raises:
            KernelUnavailableError: no native kernel can be compiled here.
        """
        group = self.group(parameters)
        state = None if ahead is None else ahead.state_for(group)
        stored = [parameter for table in parameters for parameter in table]
        if not torch.is_grad_enabled():
            return group.forward(stored, batch, keep=False, state=state)[0]
        stepped = [
            is_stepped(step, k)
            for table, step in zip(parameters, steps, strict=True)
            for k in range(len(table))
        ]
        wanted = [p.requires_grad and not step for p, step in zip(stored, stepped, strict=True)]
        free = [parameter for parameter, want in zip(stored, wanted, strict=True) if want]
        # Without an update, whether a gradient is wanted is for the parameters and weights to say.
        anchor = _ANCHOR if any(stepped) else None
        call = _Call(group, self.refusal, batch, stored, steps, stepped, wanted, state)
        return cast(Tensor, cast(Any, _Pool).apply(call, anchor, weights, *free))

    def prepare(self, parameters: Sequence[Sequence[Tensor]], batch: Batch) -> Ahead:
        """Sort and group a batch beside what runs now: in a thread, or on a stream of the GPU's own."""
        group = self.group(parameters)
        stored = [parameter for table in parameters for parameter in table]
        if stored[0].is_cpu:
            return Ahead(group, _beside().submit(group.prepare, stored, batch).result)
        made = group.prepare(stored, batch)
        return Ahead(group, lambda: made)

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


@cache
def _beside() -> ThreadPoolExecutor:
    # One: on two cores a second one would only slow the step down.
    return ThreadPoolExecutor(1, thread_name_prefix="recemb-prefetch")


@dataclass(slots=True, eq=False)
class _Call:
    """One look-up: what is known of it before it runs, per parameter whether a kernel steps it, or its
    gradient is wanted."""

    group: PooledGroup
    refusal: Callable[[], Exception]
    batch: Batch
    stored: Sequence[Tensor]
    steps: Sequence[Step | None]
    stepped: Sequence[bool]
    wanted: Sequence[bool]
    state: Any

    def versions(self) -> list[int]:
        """How often each stepped parameter has been changed in place."""
        return [p._version for p, step in zip(self.stored, self.stepped, strict=True) if step]


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
        out, ctx.state = call.group.forward(call.stored, call.batch, keep=True, state=call.state)
        ctx.call, ctx.versions = call, call.versions()
        # Read again in the backward: autograd then complains when one was changed in place.
        batch = call.batch
        ctx.save_for_backward(
            batch.ids, batch.offsets, *(() if batch.weights is None else (batch.weights,)), *free
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        _ = ctx.saved_tensors
        call: _Call = ctx.call
        updates = [None if step is None else step.make() for step in call.steps]
        if ctx.versions != call.versions():
            # A step has been taken since the forward: its products belong to weights that are gone.
            call.group.forward(call.stored, call.batch, keep=True, state=ctx.state)
        try:
            grads, grad_weights = call.group.backward(
                grad_out,
                call.stored,
                call.batch,
                ctx.state,
                updates=updates,
                wanted=call.wanted,
                want_weights=ctx.needs_input_grad[2],
            )
        except FloatingPointError:
            raise call.refusal() from None
        stepped = [p for p, step in zip(call.stored, call.stepped, strict=True) if step]
        if stepped:
            torch.autograd.graph.increment_version(stepped)
        free = [grad for grad, want in zip(grads, call.wanted, strict=True) if want]
        return None, None, grad_weights, *free


_ANCHOR = torch.empty(0, requires_grad=True, dtype=torch.float32, device="cpu")
