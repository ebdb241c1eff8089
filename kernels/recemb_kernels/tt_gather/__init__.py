"""``recemb::tt_gather``: pool bags of rows of any number of tensor-train tables in one call.

    out[b, columns of feature f] = sum over the bag of w * G_1[i_1] G_2[i_2] ... G_d[i_d]

Schema: ``(Tensor[] cores, Tensor ids, Tensor offsets, Tensor? weights, int batch_size, int[] shapes,
int[] features) -> (Tensor out, Tensor counts, Tensor plan, Tensor rows, Tensor partials, Tensor packed,
Tensor grad_numel)``.
The tensors after ``out`` are what the backward re-uses. Cores come table by table, each
[p_k, R_{k-1} q_k R_k] in float32; ``shapes`` and ``features`` are flat codes made by :func:`encode`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recemb_kernels.build import KernelUnavailableError
from recemb_kernels.tt_gather.cpu import MAX_ORDER, Batch, Saved, TrainGroup, TrainShape
from recemb_kernels.update import Update

_F = TypeVar("_F", bound=Callable[..., Any])

__all__ = ["MAX_ORDER", "KernelUnavailableError", "TrainShape", "encode", "tt_gather"]

# torch.library is untyped.
_LIBRARY = cast(Any, torch.library).Library("recemb", "FRAGMENT")
_INPUTS = (
    "Tensor[] cores, Tensor ids, Tensor offsets, Tensor? weights, "
    "int batch_size, int[] shapes, int[] features"
)
_SAVED = "Tensor counts, Tensor plan, Tensor rows, Tensor partials, Tensor packed, Tensor grad_numel"
_LIBRARY.define(f"tt_gather({_INPUTS}) -> (Tensor out, {_SAVED})")
_LIBRARY.define(
    f"tt_gather_backward(Tensor grad_out, {_INPUTS}, {_SAVED}, bool want_weights) -> (Tensor[], Tensor)"
)


def tt_gather(
    cores: Sequence[Tensor],
    ids: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    batch_size: int,
    code: tuple[tuple[int, ...], tuple[int, ...]],
    update: Callable[[], Update] | None = None,
) -> Tensor:
    """Pool a batch of F features.

    Args:
        cores: every core of every table, float32 on CPU.
        ids: [L] int64, already checked against the tables' rows.
        offsets: [F * B + 1] int64.
        weights: [L] float32, or ``None``.
        batch_size: B.
        code: what :func:`encode` returned.
        update: makes the optimizer step to take in the backward, in place of core gradients; eager mode only.

    Returns:
        [B, sum of D over the features].

    Raises:
        KernelUnavailableError: no native kernel can be compiled here.
    """
    out: Tensor
    if torch.compiler.is_compiling():
        out = torch.ops.recemb.tt_gather(list(cores), ids, offsets, weights, batch_size, *code)[0]
    else:
        # The same forward and backward without the dispatcher, which costs four times the kernel at B = 64.
        apply: Any = _Eager.apply
        anchor = None if update is None else torch.empty(0, requires_grad=True)
        # Detached under a fused update, so that hooks on the cores' gradients do not fire for nothing.
        inputs = cores if update is None else [core.detach() for core in cores]
        out = apply((code, batch_size, update), anchor, ids, offsets, weights, *inputs)
    return out


def encode(
    shapes: Sequence[TrainShape], features: Sequence[tuple[int, bool]]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Flat integer codes of the tables' shapes and of each feature's (table, is mean)."""
    flat: list[int] = []
    for shape in shapes:
        flat += [shape.order, *shape.row_shape, *shape.dim_shape, *shape.ranks]
    return tuple(flat), tuple(int(x) for feature in features for x in feature)


@lru_cache(maxsize=256)
def _group(shapes: tuple[int, ...], features: tuple[int, ...]) -> TrainGroup:
    return TrainGroup(_decode(shapes), [(t, bool(m)) for t, m in zip(*[iter(features)] * 2, strict=True)])


def _decode(flat: tuple[int, ...]) -> list[TrainShape]:
    shapes, at = [], 0
    while at < len(flat):
        order = flat[at]
        rows, dims, end = at + 1, at + 1 + order, at + 2 + 3 * order
        shapes.append(TrainShape(flat[rows:dims], flat[dims : dims + order], flat[dims + order : end]))
        at = end
    return shapes


def _opaque(function: _F) -> _F:
    """Keep torch.compile from tracing into Python that is called from C++ and only fills pointers."""
    return cast(_F, cast(Any, torch.compiler).disable(function))


@_opaque
def _forward(
    cores: list[Tensor],
    ids: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    batch_size: int,
    shapes: Sequence[int],
    features: Sequence[int],
) -> tuple[Tensor, ...]:
    group = _group(tuple(shapes), tuple(features))
    batch = _batch(ids, offsets, weights, batch_size)
    out, saved = group.forward([core.contiguous() for core in cores], batch)
    return out, saved.counts, saved.plan, saved.rows, saved.partials, saved.packed, saved.grad_numel


@_opaque
def _backward(grad_out: Tensor, *arguments: Any) -> tuple[list[Tensor], Tensor]:
    cores, ids, offsets, weights, batch_size, shapes, features, *saved, want_weights = arguments
    group = _group(tuple(shapes), tuple(features))
    batch = _batch(ids, offsets, weights, batch_size)
    grads, grad_weights = group.backward(
        grad_out, [core.contiguous() for core in cores], batch, Saved(*saved), want_weights=want_weights
    )
    return grads, grad_out.new_empty(0) if grad_weights is None else grad_weights


def _batch(ids: Tensor, offsets: Tensor, weights: Tensor | None, batch_size: int) -> Batch:
    return Batch(
        ids.contiguous(), offsets.contiguous(), None if weights is None else weights.contiguous(), batch_size
    )


def _fake_forward(
    cores: list[Tensor],
    ids: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    batch_size: int,
    shapes: Sequence[int],
    features: Sequence[int],
) -> tuple[Tensor, ...]:
    group = _group(tuple(shapes), tuple(features))
    plan = ids.new_empty(group.plan_numel(ids.numel()), dtype=torch.int32)
    # How many rows, prefixes and slices are distinct depends on the ids' values.
    unknown = torch.library.get_ctx().new_dynamic_size
    floats = [cores[0].new_empty(unknown()) for _ in range(3)]
    out = cores[0].new_empty(batch_size, group.columns)
    return out, ids.new_empty(group.counts_shape), plan, *floats, ids.new_empty(1)


def _fake_backward(grad_out: Tensor, *arguments: Any) -> tuple[list[Tensor], Tensor]:
    cores, ids = arguments[0], arguments[1]
    grads = [torch.empty_like(core, memory_format=torch.contiguous_format) for core in cores]
    return grads, grad_out.new_empty(ids.numel() if arguments[-1] else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cores, ids, offsets, weights, ctx.batch_size, ctx.shapes, ctx.features = inputs
    ctx.num_cores, ctx.weighted = len(cores), weights is not None
    ctx.save_for_backward(*cores, ids, offsets, *(() if weights is None else (weights,)), *output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = (None,) * 5
    if grad_out is None:
        return [None] * ctx.num_cores, None, *nothing
    tensors = list(ctx.saved_tensors)
    cores, (ids, offsets), saved = tensors[: ctx.num_cores], tensors[ctx.num_cores :][:2], tensors[-6:]
    weights = tensors[ctx.num_cores + 2] if ctx.weighted else None
    want_weights = ctx.weighted and ctx.needs_input_grad[3]
    grads, grad_weights = torch.ops.recemb.tt_gather_backward(
        grad_out, cores, ids, offsets, weights, ctx.batch_size, ctx.shapes, ctx.features, *saved, want_weights
    )
    return grads, None, None, grad_weights if want_weights else None, None, None, None


class _Eager(torch.autograd.Function):
    """The op for eager mode: one autograd node, nothing traced."""

    @staticmethod
    def forward(
        ctx: Any, static: Any, anchor: Any, ids: Tensor, offsets: Tensor, weights: Any, *cores: Any
    ) -> Any:
        code, ctx.batch_size, ctx.update = static
        ctx.group, ctx.weighted = _group(*code), weights is not None
        out, ctx.saved = ctx.group.forward(cores, _batch(ids, offsets, weights, ctx.batch_size))
        # The fused update writes to the cores, which save_for_backward would take for a mistake.
        ctx.cores = cores if ctx.update is not None else ()
        kept = () if ctx.update is not None else cores
        ctx.save_for_backward(ids, offsets, *((weights,) if ctx.weighted else ()), *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        ids, offsets, *rest = ctx.saved_tensors
        weights, kept = (rest[0], rest[1:]) if ctx.weighted else (None, rest)
        grads, grad_weights = ctx.group.backward(
            grad_out,
            kept or ctx.cores,
            _batch(ids, offsets, weights, ctx.batch_size),
            ctx.saved,
            want_weights=ctx.weighted and ctx.needs_input_grad[4],
            update=None if ctx.update is None else ctx.update(),
        )
        return None, None, None, None, grad_weights, *(grads or [None] * len(ctx.cores))


_LIBRARY.impl("tt_gather", _forward, "CPU")
_LIBRARY.impl("tt_gather_backward", _backward, "CPU")
torch.library.register_fake("recemb::tt_gather", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("recemb::tt_gather_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd("recemb::tt_gather", _autograd, setup_context=_setup_context, lib=_LIBRARY)
