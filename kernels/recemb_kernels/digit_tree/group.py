"""Look-ups of a group of tables on CPU: fills the C++ structures and calls the compiled kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recemb_kernels.build import load
from recemb_kernels.update import Update

_HERE = Path(__file__).parent
MAX_ORDER = 8
# int32 arrays of a plan (driver.cpp, struct Layout), each as long as the ids plus one per table.
_ARRAYS, _ARRAYS_PER_LEVEL = 5, 6
_Pointers = ctypes.c_void_p * MAX_ORDER
_Integers = ctypes.c_int64 * MAX_ORDER


class _Counts(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("base", "ids", "rows_at")),
        *((name, _Integers) for name in ("nodes", "touched", "packed_at", "partial_at", "grad_at")),
    )


class _Level(ctypes.Structure):
    _fields_ = (
        ("nodes", ctypes.c_int64),
        ("touched", ctypes.c_int64),
        ("pointers", ctypes.c_void_p * 6),
    )


class _Feature(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("table", "column", "mean", "key_base"))


class _Table(ctypes.Structure):
    _fields_ = (
        ("order", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("radix", _Integers),
        ("param", _Pointers),
        ("grad", _Pointers),
        ("state", _Pointers),
        ("state2", _Pointers),
        ("forward", ctypes.c_void_p),
        ("backward", ctypes.c_void_p),
        ("packed_width", _Integers),
        ("product_width", _Integers),
        ("constants", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("level", _Level * MAX_ORDER),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_tables", "num_features", "batch", "num_ids")),
        ("out_stride", ctypes.c_int64),
        ("optimizer", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("ids", "offsets", "weights", "features", "tables")),
        *((name, ctypes.c_void_p) for name in ("counts", "plan")),
        *((name, ctypes.c_void_p) for name in ("packed", "partials", "rows", "out", "grad_out")),
        *((name, ctypes.c_void_p) for name in ("grad_weights", "grad_rows", "grad_partials", "scratch")),
        *((name, ctypes.c_double) for name in ("lr", "eps", "beta1", "beta2", "step")),
    )


@dataclass(frozen=True)
class TableKernel:
    """A table as the driver sees it, and the library compiled for it.

    Args:
        library: holds ``recemb_table_forward`` and ``recemb_table_backward``.
        dim: D.
        radices: p_1 .. p_d; digit k of an id selects a row of parameter k.
        packed_widths: floats of a packed row of each parameter, 0 where rows are read in place.
        product_widths: floats that a node of each level holds.
        constants: int64 numbers that the kernel reads.
    """

    library: ctypes.CDLL
    dim: int
    radices: tuple[int, ...]
    packed_widths: tuple[int, ...]
    product_widths: tuple[int, ...]
    constants: tuple[int, ...] = ()


@dataclass(frozen=True)
class FeatureCode:
    """One feature of a call: its table, whether its bags are averaged, and what is added to its ids."""

    table: int
    mean: bool
    key_base: int = 0


@dataclass(frozen=True)
class Saved:
    """What a forward leaves for its backward, as tensors that may move in memory.

    Attributes:
        counts: [tables, *] int64, what the plan counted.
        plan: int32, the sorted and grouped ids.
        rows: the distinct rows of every table.
        partials: what is computed per distinct prefix.
        packed: padded copies of the touched parameter rows.
        grad_numel: [1] int64, floats of the prefixes' gradients.
    """

    counts: Tensor
    plan: Tensor
    rows: Tensor
    partials: Tensor
    packed: Tensor
    grad_numel: Tensor


@dataclass(frozen=True)
class Batch:
    """Contiguous int64 ids [L] and offsets [F * B + 1], float32 weights [L] or ``None``."""

    ids: Tensor
    offsets: Tensor
    weights: Tensor | None
    batch_size: int


class Group:
    """The tables of one call, with everything that does not change from batch to batch.

    Args:
        kernels: one per table.
        features: one per feature; their columns follow each other in this order.

    Raises:
        KernelUnavailableError: nothing can be compiled here.
    """

    def __init__(self, kernels: Sequence[TableKernel], features: Sequence[FeatureCode]) -> None:
        self._driver = _driver()
        self._kernels = tuple(kernels)
        self.order = max(len(kernel.radices) for kernel in kernels)
        self._tables = (_Table * len(kernels))()
        self._constants: list[ctypes.Array[ctypes.c_int64]] = []
        for table, kernel in zip(self._tables, kernels, strict=True):
            table.forward = ctypes.cast(kernel.library.recemb_table_forward, ctypes.c_void_p)
            table.backward = ctypes.cast(kernel.library.recemb_table_backward, ctypes.c_void_p)
            table.order, table.dim = len(kernel.radices), kernel.dim
            for k, radix in enumerate(kernel.radices):
                table.radix[k] = radix
                table.packed_width[k] = kernel.packed_widths[k]
                table.product_width[k] = kernel.product_widths[k]
            if kernel.constants:
                numbers = (ctypes.c_int64 * len(kernel.constants))(*kernel.constants)
                self._constants.append(numbers)
                table.constants = ctypes.addressof(numbers)
        self._features = (_Feature * len(features))()
        self.columns = 0
        for feature, code in zip(self._features, features, strict=True):
            feature.table, feature.column = code.table, self.columns
            feature.mean, feature.key_base = int(code.mean), code.key_base
            self.columns += kernels[code.table].dim

    def forward(self, parameters: Sequence[Tensor], batch: Batch) -> tuple[Tensor, Saved]:
        """Pool a batch: [B, sum of D], and what the backward needs."""
        counts = torch.zeros(self.counts_shape, dtype=torch.int64)
        call, tables = self._call(batch, counts)
        _point(tables, "param", parameters)
        pointer, threads = ctypes.addressof(call), torch.get_num_threads()
        # Zeroed, like the counts, so that what is saved depends on the inputs alone.
        plan = torch.zeros(self.plan_numel(batch.ids.numel()), dtype=torch.int32)
        call.plan = plan.data_ptr()
        sizes = (ctypes.c_int64 * 4)()
        self._driver.recemb_tree_plan(pointer, threads, ctypes.addressof(sizes))
        rows, partials, packed = (torch.empty(sizes[k]) for k in (0, 1, 3))
        saved = Saved(counts, plan, rows, partials, packed, torch.tensor([sizes[2]]))
        out = torch.empty(batch.batch_size, self.columns)
        _attach(call, saved)
        call.out = out.data_ptr()
        self._driver.recemb_tree_forward(pointer, threads)
        return out, saved

    def backward(
        self,
        grad_out: Tensor,
        parameters: Sequence[Tensor],
        batch: Batch,
        saved: Saved,
        *,
        want_weights: bool,
        update: Update | None = None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Gradients of every parameter, and of the per-sample weights when asked for.

        With an ``update``, touched rows are updated in place and no parameter gradient comes back.
        """
        call, tables = self._call(batch, saved.counts)
        _point(tables, "param", parameters)
        grads = []
        if update is None:
            grads = [torch.zeros_like(parameter) for parameter in parameters]
            _point(tables, "grad", grads)
        else:
            call.optimizer, call.lr, call.eps = update.kind, update.lr, update.eps
            call.beta1, call.beta2, call.step = update.beta1, update.beta2, update.step
            _point(tables, "state", update.state)
            _point(tables, "state2", update.state2)
        grad_out = grad_out.contiguous()
        grad_rows, grad_partials = torch.empty_like(saved.rows), torch.empty(int(saved.grad_numel))
        grad_weights = torch.empty(batch.ids.numel()) if want_weights else None
        _attach(call, saved)
        call.grad_out, call.grad_rows = grad_out.data_ptr(), grad_rows.data_ptr()
        call.grad_partials = grad_partials.data_ptr()
        call.grad_weights = None if grad_weights is None else grad_weights.data_ptr()
        self._driver.recemb_tree_backward(ctypes.addressof(call), torch.get_num_threads())
        return grads, grad_weights

    @property
    def counts_shape(self) -> tuple[int, int]:
        """Shape of ``Saved.counts``."""
        return len(self._tables), ctypes.sizeof(_Counts) // 8

    def plan_numel(self, num_ids: Any) -> Any:
        """Size of ``Saved.plan``; ``num_ids`` may be symbolic."""
        return (_ARRAYS + _ARRAYS_PER_LEVEL * self.order) * (num_ids + len(self._tables))

    def _call(self, batch: Batch, counts: Tensor) -> tuple[_Call, ctypes.Array[_Table]]:
        """The call structure and a copy of the table structures, which it points to."""
        tables = type(self._tables).from_buffer_copy(self._tables)
        call = _Call(
            num_tables=len(self._tables),
            num_features=len(self._features),
            batch=batch.batch_size,
            num_ids=batch.ids.numel(),
            out_stride=self.columns,
            ids=batch.ids.data_ptr(),
            offsets=batch.offsets.data_ptr(),
            weights=None if batch.weights is None else batch.weights.data_ptr(),
            features=ctypes.addressof(self._features),
            tables=ctypes.addressof(tables),
            counts=counts.data_ptr(),
        )
        return call, tables


def _point(tables: ctypes.Array[_Table], field: str, tensors: Sequence[Tensor]) -> None:
    """Set every parameter's pointer in ``field``; ``tensors`` holds them table by table, or is empty."""
    position = 0
    if not tensors:
        return
    for table in tables:
        pointers = getattr(table, field)
        for k in range(table.order):
            pointers[k] = tensors[position].data_ptr()
            position += 1


def _attach(call: _Call, saved: Saved) -> None:
    call.plan, call.rows = saved.plan.data_ptr(), saved.rows.data_ptr()
    call.partials, call.packed = saved.partials.data_ptr(), saved.packed.data_ptr()


@cache
def _driver() -> ctypes.CDLL:
    library = load("tree_driver", [_HERE / "driver.cpp"], {})
    for name, structure in (("call", _Call), ("table", _Table), ("counts", _Counts)):
        size = getattr(library, f"recemb_tree_{name}_size")
        size.restype = ctypes.c_int64
        if size() != ctypes.sizeof(structure):
            raise RuntimeError(f"the {name} structure of driver.cpp and of group.py differ")
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.recemb_tree_plan.argtypes = (pointer, integer, pointer)
    library.recemb_tree_forward.argtypes = library.recemb_tree_backward.argtypes = (pointer, integer)
    return library
