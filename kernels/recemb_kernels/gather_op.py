"""What every pooled look-up op has in common: schema, fake, autograd, and a short cut for eager mode.

``recemb::<name>(Tensor[] parameters, Tensor ids, Tensor offsets, Tensor? weights, int batch_size,
int[] tables, int[] features) -> (Tensor out, Tensor counts, Tensor plan, Tensor rows, Tensor partials,
Tensor packed, Tensor grad_numel)``. What follows ``out`` is re-used by the backward. ``tables`` is the
op's own flat code of its tables, ``features`` holds (table, is mean, key base) per feature.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recemb_kernels.digit_tree.group import Batch, FeatureCode, Group, Saved, TableKernel
from recemb_kernels.update import Update

_F = TypeVar("_F", bound=Callable[..., Any])
_S = TypeVar("_S")
# torch.library is untyped.
_LIBRARY = cast(Any, torch.library).Library("recemb", "FRAGMENT")
_INPUTS = (
    "Tensor[] parameters, Tensor ids, Tensor offsets, Tensor? weights, "
    "int batch_size, int[] tables, int[] features"
)
_SAVED = "Tensor counts, Tensor plan, Tensor rows, Tensor partials, Tensor packed, Tensor grad_numel"
_NUM_SAVED = 6


def _opaque(function: _F) -> _F:
    """Keep torch.compile from tracing into Python that is called from C++ and only fills pointers."""
    return cast(_F, cast(Any, torch.compiler).disable(function))


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
        self._group = lru_cache(maxsize=256)(self._make_group)
        _LIBRARY.define(f"{name}({_INPUTS}) -> (Tensor out, {_SAVED})")
        _LIBRARY.define(
            f"{name}_backward(Tensor grad_out, {_INPUTS}, {_SAVED}, bool want_weights) -> (Tensor[], Tensor)"
        )
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
        code: tuple[tuple[int, ...], tuple[int, ...]],
        update: Callable[[], Update] | None = None,
    ) -> Tensor:
        """Pool a batch of F features.

        Args:
            parameters: every parameter of every table, float32 on CPU.
            ids: [L] int64, already checked against the tables' rows.
            offsets: [F * B + 1] int64.
            weights: [L] float32, or ``None``.
            batch_size: B.
            code: the op's codes of tables and features.
            update: makes the optimizer step to take in the backward, in place of parameter gradients; eager
                mode only.

        Returns:
            [B, sum of D over the features].

        Raises:
            KernelUnavailableError: no native kernel can be compiled here.
        """
        if torch.compiler.is_compiling():
            return cast(Tensor, self._op(list(parameters), ids, offsets, weights, batch_size, *code)[0])
        # The same forward and backward without the dispatcher, which costs four times the kernel at B = 64.
        anchor = None if update is None else torch.empty(0, requires_grad=True)
        # Detached under a fused update, so that hooks on the parameters' gradients do not fire for nothing.
        inputs = parameters if update is None else [parameter.detach() for parameter in parameters]
        static = (self._group(*code), batch_size, update)
        return cast(Tensor, cast(Any, _Eager).apply(static, anchor, ids, offsets, weights, *inputs))

    def _make_group(self, tables: tuple[int, ...], features: tuple[int, ...]) -> Group:
        codes = zip(*[iter(features)] * 3, strict=True)
        # Compilers run as processes of their own, so threads are enough to use every core.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            kernels = list(pool.map(self._kernel, self._decode(tables)))
        return Group(kernels, [FeatureCode(table, bool(mean), base) for table, mean, base in codes])

    def _forward(self, parameters: list[Tensor], *rest: Any) -> tuple[Tensor, ...]:
        *batch, tables, features = rest
        group = self._group(tuple(tables), tuple(features))
        out, saved = group.forward([parameter.contiguous() for parameter in parameters], _batch(*batch))
        return out, saved.counts, saved.plan, saved.rows, saved.partials, saved.packed, saved.grad_numel

    def _backward(self, grad_out: Tensor, *arguments: Any) -> tuple[list[Tensor], Tensor]:
        parameters, ids, offsets, weights, batch_size, tables, features, *saved, want_weights = arguments
        grads, grad_weights = self._group(tuple(tables), tuple(features)).backward(
            grad_out,
            [parameter.contiguous() for parameter in parameters],
            _batch(ids, offsets, weights, batch_size),
            Saved(*saved),
            want_weights=want_weights,
        )
        return grads, grad_out.new_empty(0) if grad_weights is None else grad_weights

    def _fake_forward(self, parameters: list[Tensor], *rest: Any) -> tuple[Tensor, ...]:
        ids, _, _, batch_size, tables, features = rest
        group = self._group(tuple(tables), tuple(features))
        plan = ids.new_empty(group.plan_numel(ids.numel()), dtype=torch.int32)
        # How many rows, prefixes and parameter rows are distinct depends on the ids' values.
        unknown = torch.library.get_ctx().new_dynamic_size
        floats = [parameters[0].new_empty(unknown()) for _ in range(3)]
        out = parameters[0].new_empty(batch_size, group.columns)
        return out, ids.new_empty(group.counts_shape), plan, *floats, ids.new_empty(1)

    def _fake_backward(self, grad_out: Tensor, *arguments: Any) -> tuple[list[Tensor], Tensor]:
        parameters, ids = arguments[0], arguments[1]
        grads = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters]
        return grads, grad_out.new_empty(ids.numel() if arguments[-1] else 0)

    def _autograd(self, ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Any, ...]:
        count = ctx.num_parameters
        if grad_out is None:
            return [None] * count, None, None, None, None, None, None
        tensors = list(ctx.saved_tensors)
        (ids, offsets), saved = tensors[count : count + 2], tensors[-_NUM_SAVED:]
        weights = tensors[count + 2] if ctx.weighted else None
        want_weights = ctx.weighted and ctx.needs_input_grad[3]
        grads, grad_weights = self._op_backward(
            grad_out, tensors[:count], ids, offsets, weights, *ctx.static, *saved, want_weights
        )
        return grads, None, None, grad_weights if want_weights else None, None, None, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    parameters, ids, offsets, weights, *ctx.static = inputs
    ctx.num_parameters, ctx.weighted = len(parameters), weights is not None
    ctx.save_for_backward(*parameters, ids, offsets, *((weights,) if ctx.weighted else ()), *output[1:])
    ctx.set_materialize_grads(False)


def _batch(ids: Tensor, offsets: Tensor, weights: Tensor | None, batch_size: int) -> Batch:
    return Batch(
        ids.contiguous(), offsets.contiguous(), None if weights is None else weights.contiguous(), batch_size
    )


class _Eager(torch.autograd.Function):
    """An op for eager mode: one autograd node, nothing traced."""

    @staticmethod
    def forward(
        ctx: Any, static: Any, anchor: Any, ids: Tensor, offsets: Tensor, weights: Any, *parameters: Any
    ) -> Any:
        ctx.group, ctx.batch_size, ctx.update = static
        ctx.weighted = weights is not None
        out, ctx.saved = ctx.group.forward(parameters, _batch(ids, offsets, weights, ctx.batch_size))
        # The fused update writes to the parameters, which save_for_backward would take for a mistake.
        ctx.parameters = parameters if ctx.update is not None else ()
        kept = () if ctx.update is not None else parameters
        ctx.save_for_backward(ids, offsets, *((weights,) if ctx.weighted else ()), *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        ids, offsets, *rest = ctx.saved_tensors
        weights, kept = (rest[0], rest[1:]) if ctx.weighted else (None, rest)
        grads, grad_weights = ctx.group.backward(
            grad_out,
            kept or ctx.parameters,
            _batch(ids, offsets, weights, ctx.batch_size),
            ctx.saved,
            want_weights=ctx.weighted and ctx.needs_input_grad[4],
            update=None if ctx.update is None else ctx.update(),
        )
        return None, None, None, None, grad_weights, *(grads or [None] * len(ctx.parameters))
