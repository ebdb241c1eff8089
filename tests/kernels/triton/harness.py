"""What the tests of every Triton family share: runs on this machine's device, references, the error law."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from recemb_kernels.digit_tree.group import Batch, FeatureCode, Group
from recemb_kernels.gather_op import GatherOp
from recemb_kernels.triton_frame.group import TritonGroup
from recemb_kernels.update import Kind, Update

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Case:
    """Tables of one op, features over them, and a batch; everything on the CPU, parameters in float32."""

    op: GatherOp[Any]
    shapes: Sequence[Any]
    features: Sequence[FeatureCode]
    parameters: list[Tensor]
    batch: Batch
    grad_out: Tensor

    @property
    def first(self) -> list[int]:
        """Each table's first parameter, and one past the last."""
        counts = [self.op.family().num_parameters(shape) for shape in self.shapes]
        return [sum(counts[:t]) for t in range(len(counts) + 1)]

    def rounded(self, dtype: torch.dtype) -> Case:
        """The same with parameters that ``dtype`` can hold."""
        return replace(self, parameters=[p.to(dtype).float() for p in self.parameters])

    def updates(self, kind: Kind, device: torch.device) -> list[Update | None]:
        """An update of every table."""
        first = self.first
        return [make_update(kind, self.parameters[a:b], device) for a, b in pairwise(first)]


def on_device(batch: Batch) -> Batch:
    weights = None if batch.weights is None else batch.weights.to(DEVICE)
    return replace(batch, ids=batch.ids.to(DEVICE), offsets=batch.offsets.to(DEVICE), weights=weights)


def triton_group(
    case: Case, dtype: torch.dtype = torch.float32, micro_batch_rows: int = 2**15
) -> TritonGroup:
    family = case.op.family()
    tables = [(family, shape) for shape in case.shapes]
    dtypes = [dtype] * len(tables)
    return TritonGroup(tables, case.features, DEVICE, dtypes, micro_batch_rows=micro_batch_rows)


def run(
    case: Case,
    dtype: torch.dtype = torch.float32,
    micro_batch_rows: int = 2**15,
    updates: Sequence[Update | None] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Forward and backward on the device: [output, gradients ..., of weights], and then the parameters."""
    group = triton_group(case, dtype, micro_batch_rows)
    parameters = [p.to(DEVICE, dtype, copy=True) for p in case.parameters]
    batch = on_device(case.batch)
    out, state = group.forward(parameters, batch, keep=True)
    grads, weights = group.backward(
        case.grad_out.to(DEVICE),
        parameters,
        batch,
        state,
        updates=updates or [None] * len(case.shapes),
        wanted=[True] * len(parameters),
        want_weights=batch.weights is not None,
    )
    found = [out, *(g for g in (*grads, weights) if g is not None)]
    return [f.cpu() for f in found], [p.cpu() for p in parameters]


def run_on_cpu(
    case: Case, updates: Sequence[Update | None] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The same by the native CPU kernels."""
    group = Group([case.op.kernel(shape) for shape in case.shapes], case.features)
    parameters = [p.clone() for p in case.parameters]
    out, state = group.forward(parameters, case.batch, keep=True)
    grads, weights = group.backward(
        case.grad_out,
        parameters,
        case.batch,
        state,
        updates=updates or [None] * len(case.shapes),
        wanted=[True] * len(parameters),
        want_weights=case.batch.weights is not None,
    )
    return [out, *(g for g in (*grads, weights) if g is not None)], parameters


def by_torch(
    case: Case, rows: Callable[[int, list[Tensor], Tensor], Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """[output, gradients ..., of weights] by autograd, storage and arithmetic in ``dtype``.

    Args:
        rows: (table, its parameters, keys [L]) -> [L, D], differentiable.
    """
    parameters = [p.to(dtype).requires_grad_() for p in case.parameters]
    batch, size = case.batch, case.batch.size
    weights = None if batch.weights is None else batch.weights.to(dtype).requires_grad_()
    columns = []
    for f, code in enumerate(case.features):
        own = parameters[case.first[code.table] : case.first[code.table + 1]]
        bounds = batch.offsets[f * size : (f + 1) * size + 1]
        begin, end = int(bounds[0]), int(bounds[-1])
        bag = torch.repeat_interleave(torch.arange(size), bounds.diff())
        found = rows(code.table, own, batch.ids[begin:end] + code.key_base)
        if weights is not None:
            found = found * weights[begin:end, None]
        pooled = found.new_zeros(size, found.shape[1]).index_add(0, bag, found)
        if code.mean:
            pooled = pooled / bounds.diff().clamp(min=1)[:, None].to(dtype)
        columns.append(pooled)
    out = torch.cat(columns, 1)
    inputs = [*parameters, *(() if weights is None else (weights,))]
    grads = torch.autograd.grad(
        out, inputs, case.grad_out.to(dtype), allow_unused=True, materialize_grads=True
    )
    return [out.detach(), *grads]


def assert_error_law(found: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """max|x - ref64| <= 2 x the same error of plain torch in that dtype, plus 1 ulp of that dtype."""
    for k, (x, torch_, reference) in enumerate(zip(found, plain, exact, strict=True)):
        if not x.numel():
            continue
        ours = (x.double() - reference).abs().max()
        theirs = (torch_.double() - reference).abs().max()
        ulp = torch.finfo(torch_.dtype).eps * reference.abs().max()
        assert ours <= 2 * theirs + ulp, (
            f"tensor {k}: error {ours:.3g}, plain torch {theirs:.3g}, ulp {ulp:.3g}"
        )


def make_update(kind: Kind, parameters: Sequence[Tensor], device: torch.device, steps: int = 2) -> Update:
    """An optimizer in the middle of its run."""
    generator = torch.Generator().manual_seed(3)

    def state(p: Tensor) -> Tensor:
        shape = (p.shape[0], 1) if kind == Kind.ROWWISE_ADAGRAD else p.shape
        return torch.rand(shape, generator=generator).to(device)

    first = [state(p) for p in parameters] if kind != Kind.SGD else []
    second = [state(p) for p in parameters] if kind == Kind.ADAM else []
    numbers = [torch.tensor(float(steps)) for _ in parameters] if kind != Kind.SGD else []
    betas = (0.9, 0.99) if kind == Kind.ADAM else (0.0, 0.0)
    decay = 0.01 if kind in (Kind.ADAGRAD, Kind.ROWWISE_ADAGRAD) else 0.0
    return Update(kind, 0.1, 1e-6, *betas, decay, first, second, numbers)


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN and impossible indices."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(True if tensor.dtype is torch.bool else torch.iinfo(tensor.dtype).max // 2)

    with (
        patch("torch.empty", lambda *a, **k: fill(empty(*a, **k))),
        patch("torch.empty_like", lambda *a, **k: fill(empty_like(*a, **k))),
    ):
        yield


class NoHostSync(TorchDispatchMode):
    """Raises where an operation would wait for the device to learn a value or a size."""

    _WAITING = (
        "_local_scalar_dense",
        "nonzero",
        "unique",
        "masked_select",
        "is_nonzero",
        "bincount",
        "equal",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if any(name.startswith(word) or name == f"_{word}2" for word in self._WAITING):
            raise AssertionError(f"{func} waits for the device")
        if name.startswith("index") and any(
            isinstance(x, Tensor) and x.dtype is torch.bool for x in _flat(args)
        ):
            raise AssertionError(f"{func} by a mask waits for the device")
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            raise AssertionError(f"{func} without a size waits for the device")
        return func(*args, **(kwargs or {}))


def _flat(args: Any) -> Iterator[Any]:
    for arg in args:
        if isinstance(arg, list | tuple):
            yield from _flat(arg)
        else:
            yield arg
