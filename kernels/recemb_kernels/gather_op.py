"""What every pooled look-up op has in common as a torch op: schema, fake and autograd, for torch.compile.

``recemb::<name>(Tensor[] parameters, Tensor ids, Tensor offsets, Tensor? weights, int batch_size,
int[] tables, int[] features) -> Tensor``. ``tables`` is the op's own flat code of its tables, ``features``
holds (table, is mean, key base) per feature. Eager mode takes the same kernels through
:mod:`recemb_kernels.lookup`, which serves tables of all ops in one call and fuses optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial, wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor

from recemb_kernels.build import KernelUnavailableError
from recemb_kernels.digit_tree.group import MICRO_BATCH_ROWS, Batch, FeatureCode, Group, TableKernel
from recemb_kernels.storage import Stored
from recemb_kernels.update import Update

if TYPE_CHECKING:
    from recemb_kernels.triton_frame.family import Family

_F = TypeVar("_F", bound=Callable[..., Any])
# torch.library is untyped.
_LIBRARY = cast(Any, torch.library).Library("recemb", "FRAGMENT")
_INPUTS = (
    "Tensor[] parameters, Tensor ids, Tensor offsets, Tensor? weights, "
    "int batch_size, int[] tables, int[] features"
)


def opaque(function: _F) -> _F:
    """Keep torch.compile from tracing into Python that only prepares calls of the kernels."""
    hidden = cast(Any, torch.compiler).disable(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # To be disabled costs an eager call more than to ask.
        return (hidden if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return cast(_F, call)


class Shape(Protocol):
    """One table's shape, in its op's terms."""

    @property
    def dim(self) -> int:
        """D."""


_S = TypeVar("_S", bound=Shape)


class PooledGroup(Protocol):
    """Tables and features that are looked up together, on CPU (``Group``) or GPU (``TritonGroup``)."""

    @property
    def num_tables(self) -> int:
        """How many tables."""

    @property
    def columns(self) -> int:
        """Sum of D over the features."""

    @property
    def alignment(self) -> int:
        """What parameters' addresses are multiples of, in bytes."""

    def prepare(self, parameters: Sequence[Tensor], batch: Batch) -> Any:
        """A forward's ``state``, worked out from the ids alone."""

    def forward(
        self, parameters: Sequence[Tensor], batch: Batch, *, keep: bool, state: Any = None
    ) -> tuple[Tensor, Any]:
        """Pool a batch, and what the backward needs."""

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
        """Gradients, or steps taken in their place."""


class GatherOp(Generic[_S]):
    """One op, registered with torch under ``recemb::<name>``.

    Args:
        name: the op's name.
        encode: a table's shape as numbers.
        decode: turns the flat code of several tables back into their shapes.
        kernel: compiles the kernel of one shape, and of how its parameters are stored when that is given
            (:mod:`recemb_kernels.storage`), which then looks up only.
        family: where the kernels for GPU are, ``module:class``; imported when first asked for.
    """

    def __init__(
        self,
        name: str,
        encode: Callable[[Sequence[_S]], tuple[int, ...]],
        decode: Callable[[tuple[int, ...]], Sequence[_S]],
        kernel: Callable[..., TableKernel],
        family: str,
    ) -> None:
        self.name, self._family = name, family
        self.encode, self._decode, self.kernel = encode, decode, kernel
        self._group: Callable[..., PooledGroup] = lru_cache(maxsize=256)(self._make_group)
        _LIBRARY.define(f"{name}({_INPUTS}) -> Tensor")
        _LIBRARY.define(
            f"{name}_backward(Tensor grad_out, {_INPUTS}, bool want_weights) -> (Tensor[], Tensor)"
        )
        for device in ("CPU", "CUDA"):
            _LIBRARY.impl(name, opaque(self._forward), device)
            _LIBRARY.impl(f"{name}_backward", opaque(self._backward), device)
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
            parameters: every parameter of every table: float32 on CPU, float32, bfloat16 or float16 on GPU.
            ids: [L] int64, already checked against the tables' rows.
            offsets: [F * B + 1] int64.
            weights: [L] float32, or ``None``.
            batch_size: B.
            tables: ``encode`` of the tables' shapes.
            features: (table, is mean, key base) per feature, flat.

        Raises:
            KernelUnavailableError: no native kernel can be compiled here.
            TypeError: a tensor is of another type.
        """
        return cast(Tensor, self._op(list(parameters), ids, offsets, weights, batch_size, tables, features))

    def stored_kernel(self, shape: _S, stored: Stored) -> TableKernel:
        """The kernel of parameters that train, or are stored for inference.

        Raises:
            KernelUnavailableError: it cannot be compiled here.
        """
        return self.kernel(shape, stored) if stored else self.kernel(shape)

    def family(self) -> type[Family[Any]]:
        """The kernels for GPU.

        Raises:
            KernelUnavailableError: Triton is not installed.
        """
        module, name = self._family.split(":")
        try:
            return cast("type[Family[Any]]", getattr(import_module(module), name))
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            message = "Triton is not installed; pip install 'recemb[gpu]'"
            raise KernelUnavailableError(message) from None

    def _make_group(
        self, tables: tuple[int, ...], features: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> PooledGroup:
        shapes = [(self, shape, ()) for shape in self._decode(tables)]
        # The op outlives the programs that call it, and graphs hold their weights.
        return make_group(shapes, features, device, [dtype] * len(shapes), graphed=False)

    def _group_of(self, parameters: list[Tensor], tables: list[int], features: list[int]) -> PooledGroup:
        first = parameters[0]
        return self._group(tuple(tables), tuple(features), first.device, first.dtype)

    def _check_types(self, parameters: list[Tensor], ids: Tensor, offsets: Tensor, weights: Any) -> None:
        """Kernels take bytes for what they expect; a GPU's also read half precision."""
        stored = (torch.float32, torch.bfloat16, torch.float16) if ids.is_cuda else (torch.float32,)
        wanted = [
            ("parameters", parameters, stored),
            ("ids", [ids], (torch.int64,)),
            ("offsets", [offsets], (torch.int64,)),
            ("weights", [] if weights is None else [weights], (torch.float32,)),
        ]
        for name, tensors, dtypes in wanted:
            wrong = next((tensor.dtype for tensor in tensors if tensor.dtype not in dtypes), None)
            if wrong is not None:
                named = " or ".join(map(str, dtypes))
                raise TypeError(f"recemb::{self.name}: {name} of {wrong} must be {named}; convert them")

    def _forward(self, parameters: list[Tensor], *rest: Any) -> Tensor:
        *batch, tables, features = rest
        self._check_types(parameters, *batch[:3])
        group = self._group_of(parameters, tables, features)
        return group.forward(_readable(parameters, group), make_batch(*batch), keep=False)[0]

    def _backward(self, grad_out: Tensor, *arguments: Any) -> tuple[list[Tensor], Tensor]:
        parameters, ids, offsets, weights, batch_size, tables, features, want_weights = arguments
        self._check_types(parameters, ids, offsets, weights)
        group = self._group_of(parameters, tables, features)
        batch = make_batch(ids, offsets, weights, batch_size)
        stored = _readable(parameters, group)
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
        shapes = self._decode(tuple(tables))
        columns = sum(shapes[table].dim for table in features[::3])
        return parameters[0].new_empty(batch_size, columns, dtype=torch.float32)

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


def _readable(parameters: Sequence[Tensor], group: PooledGroup) -> list[Tensor]:
    """Parameters as a group's kernels take them: the same, or copies."""
    contiguous = [parameter.contiguous() for parameter in parameters]
    return [p.clone() if p.data_ptr() % group.alignment else p for p in contiguous]


def make_batch(
    ids: Tensor, offsets: Tensor, weights: Tensor | None, batch_size: int, refused: Tensor | None = None
) -> Batch:
    """The batch as the kernels take it."""
    return Batch(
        ids.contiguous(),
        offsets.contiguous(),
        None if weights is None else weights.detach().contiguous().resolve_neg(),
        batch_size,
        refused,
    )


def make_group(
    tables: Sequence[tuple[GatherOp[Any], Any, Stored]],
    features: Sequence[int],
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    refusal: Callable[[], Exception] | None = None,
    micro_batch_rows: int | None = None,
    graphed: bool = True,
    joins: Sequence[int] = (),
) -> PooledGroup:
    """Group tables, given as (op, shape, how they are stored), by the kernels of one device.

    Args:
        features: (table, is mean, key base) per feature, flat.
        dtypes: per table, how its parameters are stored.
        refusal: makes the error of a backward with steps whose gradient is not finite; on GPU, where it is
            raised later. On CPU that is a FloatingPointError.
        micro_batch_rows: distinct rows that are computed at once; the device's default when ``None``.
        graphed: whether look-ups that recur may be captured in CUDA graphs, which hold the parameters.
        joins: per feature the earlier one whose bags it holds the rest of, or -1; empty for none. The CPU's
            kernels add both up in that one's columns; a GPU's leave each its own.

    Raises:
        KernelUnavailableError: a kernel cannot be had here.
    """
    codes = [FeatureCode(t, bool(mean), base) for t, mean, base in zip(*[iter(features)] * 3, strict=True)]
    if device.type == "cpu":
        kernels = [op.stored_kernel(shape, stored) for op, shape, stored in tables]
        for f, first in enumerate(joins):
            codes[f] = replace(codes[f], joins=None if first < 0 else first)
        return Group(kernels, codes, micro_batch_rows or MICRO_BATCH_ROWS)
    families = [(op.family(), shape) for op, shape, _ in tables]
    # After the families, which say what is missing.
    from recemb_kernels.triton_frame import MICRO_BATCH_ROWS as GPU_ROWS
    from recemb_kernels.triton_frame import graphs, group, recorder

    made = group.TritonGroup(
        families,
        codes,
        device,
        dtypes,
        refusal or group.not_finite,
        micro_batch_rows or GPU_ROWS,
    )
    if not graphed or not graphs.are_wanted(device):
        return made
    return graphs.GraphedGroup(made, partial(recorder.GraphRecorder, device))
