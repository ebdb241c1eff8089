"""What every pooled look-up op has in common: schema, fake, autograd, and a short cut for eager mode.

``recemb::<name>(Tensor[] parameters, Tensor ids, Tensor offsets, Tensor? weights, int batch_size,
int[] tables, int[] features) -> Tensor``. ``tables`` is the op's own flat code of its tables, ``features`` holds
(table, is mean, key base) per feature.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recemb_kernels.digit_tree.group import Batch, FeatureCode, Group, TableKernel
from recemb_kernels.update import Update

_F = TypeVar("_F", bound=Callable[..., Any])
_S = TypeVar("_S")
# torch.library is untyped.
_LIBRARY = cast(Any, torch.library).Library("recemb", "FRAGMENT")
_INPUTS = (
    "Tensor[] parameters, Tensor ids, Tensor offsets, Tensor? weights, "
    "int batch_size, int[] tables, int[] features"
)


def _opaque(function: _F) -> _F:
    """Keep torch.compile from tracing into Python that is called from C++ and only fills pointers."""
    return cast(_F, cast(Any, torch.compiler).disable(function))


@dataclass(frozen=True)
class Code:
    """What is fixed about a group of tables.

    Args:
        tables: the op's own flat code of the tables.
        features: (table, is mean, key base) per feature, flat.
        refusal: makes the error that a fused backward raises, nothing changed, for a gradient not finite.
    """

    tables: tuple[int, ...]
    features: tuple[int, ...]
    refusal: Callable[[], Exception]
    _groups: list[Group] = field(default_factory=list, compare=False, repr=False)

    def group(self, op: GatherOp[Any]) -> Group:
        """The group of this code: looked up once, because hashing hundreds of numbers outlasts a small call."""
        if not self._groups:
            self._groups.append(op.group(self.tables, self.features))
        return self._groups[0]


class GatherOp(Generic[_S]):
    """One op, registered with torch under ``recemb::<name>``.

    Args:
        name: the op's name.
        decode: turns the flat code of the tables into their shapes.
        kernel: compiles the kernel of one shape.
    """

    def __init__(
        self,
        name: str,
        decode: Callable[[tuple[int, ...]], Sequence[_S]],
        kernel: Callable[[_S], TableKernel],
    ) -> None:
        self.name = name
        self._decode, self._kernel = decode, kernel
        self.group = lru_cache(maxsize=256)(self._make_group)
        _LIBRARY.define(f"{name}({_INPUTS}) -> Tensor")
        _LIBRARY.define(f"{name}_backward(Tensor grad_out, {_INPUTS}, bool want_weights) -> (Tensor[], Tensor)")
        _LIBRARY.impl(name, _opaque(self._forward), "CPU")
        _LIBRARY.impl(f"{name}_backward", _opaque(self._backward), "CPU")
        full = f"recemb::{name}"
        torch.library.register_fake(full, self._fake_forward, lib=_LIBRARY)
        torch.library.register_fake(f"{full}_backward", self._fake_backward, lib=_LIBRARY)
        torch.library.register_autograd(full, self._autograd, setup_context=_setup_context, lib=_LIBRARY)
        self._op = getattr(torch.ops.recemb, name)
        self._op_backward = getattr(torch.ops.recemb, f"{name}_backward")

    def __call__(
        self,
        parameters: Sequence[Tensor],
        ids: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
        batch_size: int,
        code: Code,
        update: Callable[[], Update] | None = None,
    ) -> Tensor:
        """Pool a batch of F features.

        Args:
            parameters: every parameter of every table, float32 on CPU.
            ids: [L] int64, already checked against the tables' rows.
            offsets: [F * B + 1] int64.
            weights: [L] float32, or ``None``.
            batch_size: B.
            code: the tables and features.
            update: makes the optimizer step to take in the backward, in place of parameter gradients; eager
                mode only.

        Returns:
            [B, sum of D over the features].

        Raises:
            KernelUnavailableError: no native kernel can be compiled here.
        """
        if torch.compiler.is_compiling():
            static = batch_size, code.tables, code.features
            return cast(Tensor, self._op(list(parameters), ids, offsets, weights, *static))
        # The same forward and backward without the dispatcher, which costs four times the kernel at B = 64, and
        # with the plan and the products kept between the two.
        group, batch = code.group(self), _batch(ids, offsets, weights, batch_size)
        if not torch.is_grad_enabled():
            return group.forward(parameters, batch, keep=False)[0]
        if update is not None:
            static = group, batch, update, code.refusal, parameters
            return cast(Tensor, cast(Any, _Fused).apply(static, _ANCHOR, weights))
        return cast(Tensor, cast(Any, _Eager).apply(group, batch, weights, *parameters))

    def _make_group(self, tables: tuple[int, ...], features: tuple[int, ...]) -> Group:
        codes = zip(*[iter(features)] * 3, strict=True)
        # Compilers run as processes of their own, so threads are enough to use every core.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            kernels = list(pool.map(self._kernel, self._decode(tables)))
        return Group(kernels, [FeatureCode(table, bool(mean), base) for table, mean, base in codes])

    def _forward(self, parameters: list[Tensor], *rest: Any) -> Tensor:
        *batch, tables, features = rest
        group = self.group(tuple(tables), tuple(features))
        return group.forward([p.contiguous() for p in parameters], _batch(*batch), keep=False)[0]

    def _backward(self, grad_out: Tensor, *arguments: Any) -> tuple[list[Tensor], Tensor]:
        parameters, ids, offsets, weights, batch_size, tables, features, want_weights = arguments
        group, batch = self.group(tuple(tables), tuple(features)), _batch(ids, offsets, weights, batch_size)
        stored = [parameter.contiguous() for parameter in parameters]
        # Nothing but tensors crosses from the forward, so what it planned is planned once more.
        _, state = group.forward(stored, batch, keep=True)
        grads, grad_weights = group.backward(grad_out, stored, batch, state, want_weights=want_weights)
        return grads, grad_out.new_empty(0) if grad_weights is None else grad_weights

    def _fake_forward(self, parameters: list[Tensor], *rest: Any) -> Tensor:
        _, _, _, batch_size, tables, features = rest
        return parameters[0].new_empty(batch_size, self.group(tuple(tables), tuple(features)).columns)

    def _fake_backward(self, grad_out: Tensor, *arguments: Any) -> tuple[list[Tensor], Tensor]:
        parameters, ids = arguments[0], arguments[1]
        grads = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters]
        return grads, grad_out.new_empty(ids.numel() if arguments[-1] else 0)

    def _autograd(self, ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        tensors = list(ctx.saved_tensors)
        parameters, (ids, offsets, *rest) = tensors[: ctx.num_parameters], tensors[ctx.num_parameters :]
        weights = rest[0] if rest else None
        want_weights = weights is not None and ctx.needs_input_grad[3]
        grads, grad_weights = self._op_backward(
            grad_out, parameters, ids, offsets, weights, *ctx.static, want_weights
        )
        return grads, None, None, grad_weights if want_weights else None, None, None, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    parameters, ids, offsets, weights, *ctx.static = inputs
    ctx.num_parameters = len(parameters)
    ctx.save_for_backward(*parameters, ids, offsets, *(() if weights is None else (weights,)))


def _batch(ids: Tensor, offsets: Tensor, weights: Tensor | None, batch_size: int) -> Batch:
    return Batch(
        ids.contiguous(),
        offsets.contiguous(),
        None if weights is None else weights.detach().contiguous(),
        batch_size,
    )


class _Eager(torch.autograd.Function):
    """An op for eager mode: one autograd node, nothing traced."""

    @staticmethod
    def forward(ctx: Any, group: Group, batch: Batch, weights: Any, *parameters: Tensor) -> Tensor:
        stored = [parameter.contiguous() for parameter in parameters]
        out, ctx.state = group.forward(stored, batch, keep=True)
        ctx.group, ctx.batch = group, batch
        ctx.save_for_backward(*parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        stored = [parameter.contiguous() for parameter in ctx.saved_tensors]
        grads, grad_weights = ctx.group.backward(
            grad_out, stored, ctx.batch, ctx.state, want_weights=ctx.needs_input_grad[2]
        )
        return None, None, grad_weights, *grads


class _Fused(torch.autograd.Function):
    """The same with an optimizer's step in the place of parameter gradients.

    The parameters are no inputs: hooks on their gradients do not fire, and their change in the backward is not
    taken for a mistake. ``_ANCHOR`` is there so that a backward comes at all.
    """

    @staticmethod
    def forward(ctx: Any, static: Any, anchor: Any, weights: Any) -> Tensor:
        ctx.group, ctx.batch, ctx.update, ctx.refusal, ctx.parameters = static
        out, ctx.state = ctx.group.forward(ctx.parameters, ctx.batch, keep=True)
        return cast(Tensor, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        try:
            _, grad_weights = ctx.group.backward(
                grad_out,
                ctx.parameters,
                ctx.batch,
                ctx.state,
                want_weights=ctx.needs_input_grad[2],
                update=ctx.update(),
            )
        except FloatingPointError:
            raise ctx.refusal() from None
        return None, None, grad_weights


_ANCHOR = torch.empty(0, requires_grad=True)
