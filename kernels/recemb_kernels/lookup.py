"""Look-ups in eager mode: one call for all tables, each with its own optimizer in the backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recemb_kernels.digit_tree.group import Group
from recemb_kernels.gather_op import GatherOp, make_batch, make_group
from recemb_kernels.update import Update


@dataclass(frozen=True)
class TableShape:
    """One table: the op whose kernel serves it, and its shape in that op's terms."""

    op: GatherOp[Any]
    shape: Any


@dataclass(frozen=True, eq=False)
class Lookup:
    """What is fixed about a group of tables and the features that are pooled in them.

    Args:
        tables: the tables, of any ops.
        features: (table, is mean, key base) per feature, flat.
        refusal: makes the error that a backward with an update raises, nothing changed, when the gradient is
            not finite.
    """

    tables: tuple[TableShape, ...]
    features: tuple[int, ...]
    refusal: Callable[[], Exception]

    @cached_property
    def group(self) -> Group:
        """The compiled group; compiling takes seconds the first time that a shape is met on a machine."""
        return make_group([(table.op.kernel, table.shape) for table in self.tables], self.features)

    def __call__(
        self,
        parameters: Sequence[Sequence[Tensor]],
        ids: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
        batch_size: int,
        updates: Sequence[Callable[[], Update] | None],
    ) -> Tensor:
        """Pool a batch of F features, [B, sum of D over the features].

        Args:
            parameters: each table's, contiguous float32 on CPU.
            ids: [L] int64, already checked against the tables' rows.
            offsets: [F * B + 1] int64.
            weights: [L] float32, or ``None``.
            batch_size: B.
            updates: per table, makes the optimizer step to take in the backward in place of gradients.

        Raises:
            KernelUnavailableError: no native kernel can be compiled here.
        """
        group, batch = self.group, make_batch(ids, offsets, weights, batch_size)
        stored = [parameter for table in parameters for parameter in table]
        if not torch.is_grad_enabled():
            return group.forward(stored, batch, keep=False)[0]
        free = [
            parameter
            for table, update in zip(parameters, updates, strict=True)
            if update is None
            for parameter in table
        ]
        # Without an update, whether a gradient is wanted is for the parameters and weights to say.
        anchor = _ANCHOR if len(free) < len(stored) else None
        static = self, batch, stored, updates
        return cast(Tensor, cast(Any, _Pool).apply(static, anchor, weights, *free))

    def compiled(
        self,
        parameters: Sequence[Sequence[Tensor]],
        ids: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
        batch: int,
    ) -> Tensor:
        """The same as a torch op, for tables of one op: what torch.compile can take."""
        op = self.tables[0].op
        flat = [parameter for table in parameters for parameter in table]
        code = op.encode([table.shape for table in self.tables])
        return op(flat, ids, offsets, weights, batch, code, self.features)


class _Pool(torch.autograd.Function):
    """One autograd node for all tables.

    Parameters with a fused update are no inputs: hooks on their gradients do not fire, and their change in
    the backward is not taken for a mistake. ``_ANCHOR`` is there so that a backward comes even without any.
    """

    @staticmethod
    def forward(
        ctx: Any, static: Any, anchor: Tensor | None, weights: Tensor | None, *free: Tensor
    ) -> Tensor:
        ctx.lookup, ctx.batch, ctx.stored, ctx.updates = static
        out, ctx.state = ctx.lookup.group.forward(ctx.stored, ctx.batch, keep=True)
        # Autograd then complains when one of them was changed in place between forward and backward.
        ctx.save_for_backward(*free)
        return cast(Tensor, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        _ = ctx.saved_tensors
        try:
            grads, grad_weights = ctx.lookup.group.backward(
                grad_out,
                ctx.stored,
                ctx.batch,
                ctx.state,
                updates=[None if update is None else update() for update in ctx.updates],
                want_weights=ctx.needs_input_grad[2],
            )
        except FloatingPointError:
            raise ctx.lookup.refusal() from None
        return None, None, grad_weights, *(grad for grad in grads if grad is not None)


_ANCHOR = torch.empty(0, requires_grad=True)
