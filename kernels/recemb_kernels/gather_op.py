"""What every pooled look-up op has in common as a torch op: schema, fake and autograd, for torch.compile.

``recemb::<name>(Tensor[] parameters, Tensor ids, Tensor offsets, Tensor? weights, int batch_size,
int[] tables, int[] features) -> Tensor``. ``tables`` is the op's own flat code of its tables, ``features``
holds (table, is mean, key base) per feature. Eager mode takes the same kernels through
:mod:`recemb_kernels.lookup`, which serves tables of all ops in one call and fuses optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from recemb_kernels.digit_tree.group import Batch, FeatureCode, Group, TableKernel

_F = TypeVar("_F", bound=Callable[..., Any])
_S = TypeVar("_S")
# torch.library is untyped.
_LIBRARY = cast(Any, torch.library).Library("recemb", "FRAGMENT")
_INPUTS = (
    "Tensor[] parameters, Tensor ids, Tensor offsets, Tensor? weights, "
    "int batch_size, int[] tables, int[] features"
)


def opaque(function: _F) -> _F:
    """Keep torch.compile from tracing into Python that only prepares calls of the kernels."""
    return cast(_F, cast(Any, torch.compiler).disable(function))


class GatherOp(Generic[_S]):
    """One op, registered with torch under ``recemb::<name>``.

    Args:
        name: the op's name.
        encode: a table's shape as numbers.
        decode: turns the flat code of several tables back into their shapes.
        kernel: compiles the kernel of one shape.
    """

    def __init__(
        self,
        name: str,
        encode: Callable[[Sequence[_S]], tuple[int, ...]],
        decode: Callable[[tuple[int, ...]], Sequence[_S]],
        kernel: Callable[[_S], TableKernel],
    ) -> None:
        self.name = name
        self.encode, self._decode, self.kernel = encode, decode, kernel
        self._group = lru_cache(maxsize=256)(self._make_group)
        _LIBRARY.define(f"{name}({_INPUTS}) -> Tensor")
        _LIBRARY.define(
            f"{name}_backward(Tensor grad_out, {_INPUTS}, bool want_weights) -> (Tensor[], Tensor)"
        )
        _LIBRARY.impl(name, opaque(self._forward), "CPU")
        _LIBRARY.impl(f"{name}_backward", opaque(self._backward), "CPU")
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
        tables: Sequence[int],
        features: Sequence[int],
    ) -> Tensor:
        """Pool a batch of F features through torch's dispatcher, [B, sum of D over the features].

        Args:
            parameters: every parameter of every table, float32 on CPU.
            ids: [L] int64, already checked against the tables' rows.
            offsets: [F * B + 1] int64.
            weights: [L] float32, or ``None``.
            batch_size: B.
            tables: ``encode`` of the tables' shapes.
            features: (table, is mean, key base) per feature, flat.

        Raises:
            KernelUnavailableError: no native kernel can be compiled here.
        """
        return cast(Tensor, self._op(list(parameters), ids, offsets, weights, batch_size, tables, features))

    def _make_group(self, tables: tuple[int, ...], features: tuple[int, ...]) -> Group:
        shapes = self._decode(tables)
        return make_group([(self.kernel, shape) for shape in shapes], features)

    def _forward(self, parameters: list[Tensor], *rest: Any) -> Tensor:
        *batch, tables, features = rest
        group = self._group(tuple(tables), tuple(features))
        return group.forward([p.contiguous() for p in parameters], make_batch(*batch), keep=False)[0]

    def _backward(self, grad_out: Tensor, *arguments: Any) -> tuple[list[Tensor], Tensor]:
        parameters, ids, offsets, weights, batch_size, tables, features, want_weights = arguments
        group, batch = (
            self._group(tuple(tables), tuple(features)),
            make_batch(ids, offsets, weights, batch_size),
        )
        stored = [parameter.contiguous() for parameter in parameters]
        # Nothing but tensors crosses from the forward, so what it planned is planned once more.
        _, state = group.forward(stored, batch, keep=True)
        grads, grad_weights = group.backward(
            grad_out,
            stored,
            batch,
            state,
            updates=[None] * group.num_tables,
            wanted=[True] * len(stored),
            want_weights=want_weights,
        )
        empty = grad_out.new_empty(0)
        return [
            empty if grad is None else grad for grad in grads
        ], empty if grad_weights is None else grad_weights

    def _fake_forward(self, parameters: list[Tensor], *rest: Any) -> Tensor:
        _, _, _, batch_size, tables, features = rest
        return parameters[0].new_empty(batch_size, self._group(tuple(tables), tuple(features)).columns)

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


def make_batch(ids: Tensor, offsets: Tensor, weights: Tensor | None, batch_size: int) -> Batch:
    """The batch as the driver takes it."""
    return Batch(
        ids.contiguous(),
        offsets.contiguous(),
        None if weights is None else weights.detach().contiguous(),
        batch_size,
    )


def make_group(shapes: Sequence[tuple[Callable[[Any], TableKernel], Any]], features: Sequence[int]) -> Group:
    """Compile the kernels of (kernel, shape) pairs and group them.

    Args:
        features: (table, is mean, key base) per feature, flat.
    """
    codes = zip(*[iter(features)] * 3, strict=True)
    kernels = [kernel(shape) for kernel, shape in shapes]
    return Group(kernels, [FeatureCode(table, bool(mean), base) for table, mean, base in codes])
