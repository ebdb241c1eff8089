"""Look-ups of a group of tables on CPU: fills the C++ structures and calls the compiled kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recemb_kernels.build import load
from recemb_kernels.update import Kind, Update, is_stepped

_HERE = Path(__file__).parent
_DRIVER = ("driver", "check", "plan", "levels", "together", "owners", "parts", "buffer")
MAX_ORDER = 8
# A table with more distinct rows in a batch than this is computed in slices that reuse one workspace, or one
# of each thread's (parts.cpp), and its products of cores, unless they are few, are computed once more in the
# backward instead of being kept: figures of both in bench/results/micro_batches.csv.
MICRO_BATCH_ROWS = 2**13
# What a pass lacks, when it is not bytes of the driver's.
NO_TENSOR, NOT_FINITE, CHANGED = 0, -1, -2


class _Functions(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("kept", "spare", "forward", "backward", "own"))


class _Code(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("order", "dim", "parameters", "plan")),
        ("radix", ctypes.c_int64 * MAX_ORDER),
        ("product_cost", ctypes.c_double * MAX_ORDER * 2),
        ("constants", ctypes.c_void_p),
        ("kernel", _Functions),
        ("mirror", _Functions),
    )


class _Feature(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ("table", "column", "mean", "key_base", "other", "adds")
    )


class _Rule(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("optimizer", "left")),
        *((name, ctypes.c_double) for name in ("lr", "eps", "beta1", "beta2", "lr_decay")),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_tables", "num_features", "batch", "num_ids")),
        *((name, ctypes.c_int64) for name in ("columns", "slice_rows", "keep")),
        *((name, ctypes.c_void_p) for name in ("ids", "offsets", "weights", "codes", "features")),
        *((name, ctypes.c_void_p) for name in ("param", "out", "grad_out", "grad_weights")),
        *((name, ctypes.c_void_p) for name in ("rules", "grad", "state", "state2", "steps")),
        *((name, ctypes.c_void_p) for name in ("tables", "gradient", "bag", "share", "slot", "own")),
        ("own_stride", ctypes.c_int64),
    )


class ChangedError(RuntimeError):
    """Between a look-up and its backward memory has changed that the kernels write to."""

    def __init__(self) -> None:
        super().__init__(
            "a parameter, or a state of its optimizer, has another type, size or layout than at the look-up; "
            "no weight has changed. Convert models between a backward and the next look-up"
        )


class Plan(IntEnum):
    """The first pass that needs a table's ids sorted and made distinct, in ``driver.cpp``'s numbering."""

    NEVER = 0
    FORWARD = 1
    BACKWARD = 2


@dataclass(frozen=True)
class TableKernel:
    """A table as the driver sees it, and the library compiled for it.

    Args:
        library: holds ``recemb_kernel``, and ``recemb_kernel_mirrored`` when ``mirrored_cost`` is given.
        dim: D.
        radices: p_1 .. p_d; digit k of an id selects a row of parameter k.
        parameters: how many parameters the table has.
        plan: the pass that works on the batch's distinct rows.
        cost: work per distinct prefix of each length, for tables that share products of parameters.
        mirrored_cost: the same per distinct suffix.
        constants: int64 numbers that the kernel reads.
    """

    library: ctypes.CDLL
    dim: int
    radices: tuple[int, ...]
    parameters: int
    plan: Plan = Plan.BACKWARD
    cost: tuple[float, ...] = ()
    mirrored_cost: tuple[float, ...] = ()
    constants: tuple[int, ...] = ()


@dataclass(frozen=True)
class FeatureCode:
    """One feature of a call: its table, whether its bags are averaged, and what is added to its ids.

    ``joins`` is an earlier feature whose bags it holds the rest of: rows of both are added up in that one's
    columns, and averaged over all ids of both. Neither is another one's rest.
    """

    table: int
    mean: bool
    key_base: int = 0
    joins: int | None = None


@dataclass(frozen=True)
class Batch:
    """Contiguous ids [L] int64, offsets [F * B + 1] int64, weights [L] float32 or ``None``, and B.

    ``refused`` [1] int32 marks, on a device, a batch that no weight may change for.
    """

    ids: Tensor
    offsets: Tensor
    weights: Tensor | None
    size: int
    refused: Tensor | None = None


class State:
    """What one forward leaves for its backward: memory of the driver, given back when it is dropped."""

    def __init__(self, pool: int, pointer: int) -> None:
        self._pool, self.pointer = pool, pointer
        self._driver = driver()  # a state may be dropped when the interpreter has taken this module apart
        self.prepared = False

    def hand_over(self) -> int:
        """The memory, for a caller who gives it back."""
        pointer, self.pointer = self.pointer, 0
        return pointer

    def __del__(self) -> None:
        if self.pointer:
            self._driver.recemb_tree_give(self._pool, self.pointer)


class Group:
    """Tables and features that are looked up together; fixed, so built once and called for every batch.

    Every pass makes all its room before it writes anything of its caller's: a MemoryError changes neither
    parameters nor their optimizers' states, and what was asked for can be asked for again.

    Args:
        kernels: one per table.
        features: in the order of the output's columns.
        micro_batch_rows: distinct rows of a table that are computed at once (:data:`MICRO_BATCH_ROWS`).
    """

    alignment = 1

    def __init__(
        self,
        kernels: Sequence[TableKernel],
        features: Sequence[FeatureCode],
        micro_batch_rows: int = MICRO_BATCH_ROWS,
    ) -> None:
        self.driver = driver()
        self.pool: int = self.driver.recemb_tree_pool_new() or 0
        if not self.pool:
            raise MemoryError("no memory for a group of tables")
        self._kernels = tuple(kernels)  # keeps the libraries loaded
        self._constants: list[ctypes.Array[ctypes.c_int64]] = []
        self._codes = (_Code * len(kernels))(*map(self._code, kernels))
        self._features = (_Feature * len(features))()
        self.num_tables, self.columns = len(kernels), 0
        self.parameters = [kernel.parameters for kernel in kernels]
        for f, (feature, code) in enumerate(zip(self._features, features, strict=True)):
            feature.table, feature.column = code.table, self.columns
            feature.mean, feature.key_base, feature.other = int(code.mean), code.key_base, -1
            if code.joins is None:
                self.columns += kernels[code.table].dim
            else:
                first = self._features[code.joins]
                feature.column, feature.other, feature.adds, first.other = first.column, code.joins, 1, f
        parameters = sum(self.parameters)
        # ctypes makes an array's type anew, slowly, whenever nobody holds it.
        self._list, self._four_lists = (ctypes.c_void_p * (k * parameters) for k in (1, 4))
        self._rules = _Rule * len(kernels)
        self.template = _Call(
            num_tables=self.num_tables,
            num_features=len(features),
            columns=self.columns,
            slice_rows=micro_batch_rows,
            codes=ctypes.addressof(self._codes),
            features=ctypes.addressof(self._features),
        )

    @property
    def workspace_bytes(self) -> int:
        """Bytes for products of parameters and rows of batches, the most so far; plans are not counted."""
        return self._at_rest()[1]

    @property
    def at_rest(self) -> int:
        """How many look-ups' memory is not in use."""
        return self._at_rest()[0]

    def _at_rest(self) -> tuple[int, int]:
        size = ctypes.c_int64()
        return self.driver.recemb_tree_at_rest(self.pool, ctypes.byref(size)), size.value

    def __del__(self) -> None:
        if getattr(self, "pool", 0):  # it could be made
            self.driver.recemb_tree_pool_free(self.pool)

    @property
    def driver_addresses(self) -> tuple[int, ...]:
        """Of a call without a batch, the memory at rest, and what takes it, gives it back, and runs."""
        names = ("take", "give", "forward", "backward")
        functions = [getattr(self.driver, f"recemb_tree_{name}") for name in names]
        found = [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions]
        return ctypes.addressof(self.template), self.pool, *found

    def prepare(self, parameters: Sequence[Tensor], batch: Batch) -> State:
        """Sort and group a batch ahead of its forward, on this thread alone; what it computes stays the same.

        Args:
            parameters: those of the forward; none is read.
        """
        state, call = self._state(), self._call(parameters, batch)
        self._lacks(self.driver.recemb_tree_prepare(ctypes.addressof(call), state.pointer, 1), batch)
        state.prepared = True
        return state

    def forward(
        self, parameters: Sequence[Tensor], batch: Batch, *, keep: bool, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Pool a batch: [B, sum of D], and what the backward needs when ``keep`` says that one comes.

        A ``state`` of the same batch comes from :meth:`prepare`, or is filled again for parameters that have
        changed since.
        """
        state = self._state() if state is None else state
        out = self._room(batch, _floats, batch.size, self.columns)
        call = self._call(parameters, batch)
        call.out, call.keep = out.data_ptr(), int(keep)
        threads, prepared = torch.get_num_threads(), int(state.prepared)
        state.prepared = False
        self._lacks(
            self.driver.recemb_tree_forward(ctypes.addressof(call), state.pointer, threads, prepared), batch
        )
        return out, state

    def backward(
        self,
        grad_out: Tensor,
        parameters: Sequence[Tensor],
        batch: Batch,
        state: State,
        *,
        updates: Sequence[Update | None],
        wanted: Sequence[bool],
        want_weights: bool,
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """Gradients of the parameters that are ``wanted``, and of the per-sample weights when asked for.

        A table with an update has its touched rows updated in place, and ``None`` for the gradients of the
        parameters that are stepped.

        Raises:
            FloatingPointError: there is an update and ``grad_out`` is not finite; nothing has changed.
            MemoryError: nor has it then.
        """
        call = self._call(parameters, batch)
        grad_out = grad_out.contiguous()
        grad_weights = self._room(batch, _floats, batch.ids.numel()) if want_weights else None
        call.keep = 1
        call.grad_out = grad_out.data_ptr()
        call.grad_weights = None if grad_weights is None else grad_weights.data_ptr()
        grads: list[Tensor | None] = [None] * len(parameters)
        # Of each parameter its gradient, states and number of steps, in lists one after the other.
        held, rules, each, at = self._four_lists(), self._rules(), len(parameters), 0
        for kernel, rule, update in zip(self._kernels, rules, updates, strict=True):
            for k in range(at, at + kernel.parameters):
                if wanted[k] and not is_stepped(update, k - at):
                    grads[k] = grad = self._room(batch, torch.zeros_like, parameters[k])
                    held[k] = grad.data_ptr()
            if update is not None:
                for left in update.left:
                    rule.left |= 1 << left
                rule.optimizer, rule.lr, rule.eps = update.kind, update.lr, update.eps
                rule.beta1, rule.beta2, rule.lr_decay = update.beta1, update.beta2, update.lr_decay
                own = parameters[at : at + kernel.parameters]
                row_wise = update.kind is Kind.ROWWISE_ADAGRAD
                numbers = [len(parameter) if row_wise else parameter.numel() for parameter in own]
                _place(held, each + at, update.state, numbers)
                _place(held, 2 * each + at, update.state2, numbers)
                _place(held, 3 * each + at, update.steps, [1] * len(own))
            at += kernel.parameters
        call.grad = base = ctypes.addressof(held)
        call.state, call.state2, call.steps = base + 8 * each, base + 16 * each, base + 24 * each
        call.rules = ctypes.addressof(rules)
        threads = torch.get_num_threads()
        lacks = self.driver.recemb_tree_backward(ctypes.addressof(call), state.pointer, threads)
        self._lacks(lacks, batch)
        return grads, grad_weights

    def _state(self) -> State:
        pointer = self.driver.recemb_tree_take(self.pool)
        if pointer is None:
            raise MemoryError("no memory for a look-up")
        return State(self.pool, pointer)

    def _room(self, batch: Batch, make: Callable[..., Tensor], *of: Any) -> Tensor:
        """A tensor for the caller, of rows or of gradients."""
        try:
            return make(*of)
        except RuntimeError as error:  # torch's allocator has no other
            raise self.error(NO_TENSOR, batch.ids.numel(), batch.size) from error

    def _lacks(self, size: int, batch: Batch) -> None:
        if size:
            raise self.error(size, batch.ids.numel(), batch.size)

    def error(
        self, lacks: int, num_ids: int, samples: int
    ) -> FloatingPointError | MemoryError | ChangedError:
        """What is raised of a batch when nothing has changed.

        Args:
            lacks: bytes that there is no room for, or ``NO_TENSOR``, ``NOT_FINITE`` or ``CHANGED``.
            num_ids: L.
            samples: B.
        """
        if lacks == NOT_FINITE:
            return FloatingPointError("the gradient of the pooled rows is NaN or infinite")
        if lacks == CHANGED:
            return ChangedError()
        what = f"{lacks:,} bytes more" if lacks else "its rows or gradients"
        return MemoryError(
            f"no memory for {what}, for {num_ids:,} ids of {samples:,} samples in "
            f"{self.num_tables} tables; nothing has changed. Use a smaller batch, or where tensor trains "
            f"take it, micro_batch_rows below {self.template.slice_rows:,}"
        )

    def _code(self, kernel: TableKernel) -> _Code:
        code = _Code(
            order=len(kernel.radices),
            dim=kernel.dim,
            parameters=kernel.parameters,
            plan=kernel.plan,
            kernel=_Functions.in_dll(kernel.library, "recemb_kernel"),
        )
        code.radix[: len(kernel.radices)] = kernel.radices
        code.product_cost[0][: len(kernel.cost)] = kernel.cost
        if kernel.mirrored_cost:
            code.product_cost[1][: len(kernel.mirrored_cost)] = kernel.mirrored_cost
            code.mirror = _Functions.in_dll(kernel.library, "recemb_kernel_mirrored")
        if kernel.constants:
            numbers = (ctypes.c_int64 * len(kernel.constants))(*kernel.constants)
            self._constants.append(numbers)
            code.constants = ctypes.addressof(numbers)
        return code

    def _call(self, parameters: Sequence[Tensor], batch: Batch) -> _Call:
        call = _Call.from_buffer_copy(self.template)
        # A plain attribute: lives as long as the structure that points to it.
        pointers = [parameter.data_ptr() for parameter in parameters]
        if not all(pointers):
            raise RuntimeError(
                "the memory of a parameter has been given away, as sharding modules do between steps; no "
                "weight has changed"
            )
        call.held = self._list(*pointers)
        call.param = ctypes.addressof(call.held)
        call.batch, call.num_ids = batch.size, batch.ids.numel()
        call.ids, call.offsets = batch.ids.data_ptr(), batch.offsets.data_ptr()
        if batch.weights is not None:
            call.weights = batch.weights.data_ptr()
        return call


def _floats(*size: int) -> Tensor:
    # Whatever the default dtype and device are.
    return torch.empty(*size, dtype=torch.float32, device="cpu")


def _place(
    held: ctypes.Array[ctypes.c_void_p], at: int, tensors: Sequence[Tensor | None], numbers: Sequence[int]
) -> None:
    for k, tensor in enumerate(tensors):
        if tensor is not None:
            # Whoever made the update has looked at these very tensors before, but not at what is in them now.
            readable = tensor.dtype is torch.float32 and tensor.is_contiguous()
            if not readable or tensor.numel() != numbers[k]:
                raise ChangedError
            held[at + k] = tensor.data_ptr()


@cache
def driver() -> ctypes.CDLL:
    """The compiled driver.

    Raises:
        KernelUnavailableError: it cannot be compiled here.
    """
    sources = [_HERE / f"{name}.cpp" for name in _DRIVER]
    library = load("tree_driver", sources, {})
    for name, structure in (("call", _Call), ("code", _Code)):
        size = getattr(library, f"recemb_tree_{name}_size")
        size.restype = ctypes.c_int64
        if size() != ctypes.sizeof(structure):
            raise RuntimeError(f"the {name} structures of driver.cpp and of group.py differ")
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.recemb_tree_pool_new.argtypes, library.recemb_tree_pool_new.restype = (), pointer
    library.recemb_tree_pool_free.argtypes, library.recemb_tree_pool_free.restype = (pointer,), None
    library.recemb_tree_take.argtypes, library.recemb_tree_take.restype = (pointer,), pointer
    library.recemb_tree_give.argtypes, library.recemb_tree_give.restype = (pointer, pointer), None
    library.recemb_tree_at_rest.argtypes, library.recemb_tree_at_rest.restype = (pointer, pointer), integer
    library.recemb_tree_forward.argtypes = (pointer, pointer, integer, integer)
    library.recemb_tree_backward.argtypes = (pointer, pointer, integer)
    library.recemb_tree_prepare.argtypes = (pointer, pointer, integer)
    for function in ("prepare", "forward", "backward"):
        getattr(library, f"recemb_tree_{function}").restype = integer
    for function in ("poison", "fail", "alone"):
        for_tests = getattr(library, f"recemb_tree_{function}")
        for_tests.argtypes, for_tests.restype = (integer,), None
    library.recemb_tree_threads.argtypes, library.recemb_tree_threads.restype = (pointer, integer), integer
    library.recemb_tree_check.argtypes = (*(pointer,) * 3, *(integer,) * 3, pointer, integer)
    library.recemb_tree_check.restype = integer
    return library
