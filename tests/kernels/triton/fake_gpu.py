"""Tensors on the CPU that say they are on a GPU, and launches that are noted before they are run.

Tensors lie on the CPU and say that they are on ``cuda:0``, so that the code for a GPU runs as it is. Kernels'
accesses are those that Triton's interpreter makes, whatever pointer they go through; those of torch's
operations are their arguments.
"""

from __future__ import annotations

import gc
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.cuda._sanitizer import zip_arguments
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from recemb_kernels.triton_frame import recorder, streams, verdict
from tests.kernels.triton.no_host_sync import what_waits
from tests.kernels.triton.stream_order import (
    CUDA,
    HOST,
    Capture,
    Event,
    Gpu,
    Graph,
    Memory,
    OrderError,
    Place,
    Pool,
    Stream,
    function_off,
)

# Those that cuBLAS multiplies for.
_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "addmv", "addmv_"}


class FakeGpu(Gpu):
    """Runs what is launched, or records it."""

    @contextmanager
    def wanting(self, kind: str) -> Iterator[None]:
        """What is made meanwhile lies there: ``cuda``, ``pinned`` or ``cpu``."""
        before = getattr(self._local, "wanted", None)
        self._local.wanted = kind
        try:
            yield
        finally:
            self._local.wanted = before

    @contextmanager
    def seeing(self) -> Iterator[None]:
        """Operations of this thread are seen."""
        if getattr(self._local, "seeing", False):
            yield
            return
        self._local.seeing = True
        try:
            with _Devices(self), _Ops(self):
                yield
        finally:
            self._local.seeing = False

    @contextmanager
    def autograd(self, forward: Stream) -> Iterator[None]:
        """For a backward: autograd runs a node on its forward's stream, and both wait for each other."""
        caller = self.current()
        forward.wait_stream(caller)
        with self.stream(forward):
            yield
        caller.wait_stream(forward)

    def run_backward(self, *args: Any, **kwargs: Any) -> Any:
        """Of autograd's engine: torch has left the mode for it."""
        with nullcontext() if cast(Any, torch._C)._len_torch_function_stack() else _Devices(self):
            return _engine_run_backward(*args, **kwargs)

    def run_kernel(self, run: Callable[..., None], grid: Any, args: Any, kwargs: Any) -> None:
        """Launch a Triton kernel, or record it."""
        with function_off(), _disable_current_modes():
            capture = self.capture()
            if capture is None:
                self._interpret(run, grid, args, kwargs)
                return
            given = tree_map_only(Tensor, self.place, (args, kwargs))

            def again() -> None:
                own_args, own_kwargs = _opened(given)
                self._interpret(run, grid, own_args, own_kwargs, capture.pool.memories)

            capture.graph.launches.append(again)

    def run_op(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation of torch's, or record it."""
        name, capture = func.overloadpacket.__name__, self.capture()
        reads, writes = self._accesses(func, args, kwargs)
        waits = what_waits(func, args, kwargs) and any(not memory.pinned for memory in reads)
        if waits:
            self.host_waits(name)
        if name in _PRODUCTS and (reads or writes):
            self.take_workspace()
        mutated = [x for a, x in zip_arguments(func._schema, args, kwargs) if _is_write(a)]
        # What a capture holds is not run: the host cannot see it, and memory stays as it is.
        if capture is not None and writes:
            out = mutated[0] if func._schema.returns else None
        else:
            out = func(*args, **kwargs)
        made = self._made(out, args, kwargs)
        fills = [] if "empty" in name else made
        filled = [memory for memory in map(self.of, fills) if memory is not None]
        touched = {memory.pinned for memory in (*reads, *writes, *filled)}
        if not touched:
            return out
        if touched == {True}:
            self.launch(name, reads, writes, by=HOST)
            return out
        pageable = name == "copy_" and any(self.of(tensor) is None for tensor in args[:2])
        if capture is not None:
            if pageable:
                self.may_wait("a copy of memory that is not pinned")
            self._record(capture, func, (args, kwargs), fills, reads, [*writes, *filled])
            return out
        self.launch(name, reads, [*writes, *filled])
        over = name == "copy_" and (pageable or len(touched) > 1)
        if waits or (over and not kwargs.get("non_blocking", args[2:3])):
            self.host_waits(name)
        return out

    def place(self, tensor: Tensor) -> Any:
        """For a graph: a tensor's place, or the value that it has on the host."""
        memory = self.of(tensor)
        if memory is None:
            return tensor.clone()
        memory.recorded = True
        return Place(memory, tensor.dtype, (tensor.size(), tensor.stride(), tensor.storage_offset()))

    def _interpret(
        self, run: Callable[..., None], grid: Any, args: Any, kwargs: Any, recorded: Sequence[Memory] = ()
    ) -> None:
        self.sweep()
        with self._lock, function_off(), _disable_current_modes():
            pointers = _Pointers(grid.fn.__name__, {*self.memories.values(), *recorded})
            with patch.object(interpreter, "_interpreter", pointers):
                run(grid, *args, **kwargs)
        self.launch(grid.fn.__name__, pointers.reads, pointers.writes)

    def _made(self, out: Any, args: Any, kwargs: Any) -> list[Tensor]:
        """Tensors on the device that an operation has made, which are known from now on."""
        wanted: str | None = getattr(self._local, "wanted", None)
        if wanted is None and any(not memory.pinned for memory in self._seen(args, kwargs)):
            wanted = "cuda"
        new = [x for x in tree_leaves(out) if isinstance(x, Tensor) and self.of(x) is None]
        if wanted in ("cuda", "pinned"):
            for tensor in new:
                self.adopt(tensor, wanted == "pinned")
        return new if wanted == "cuda" else []

    def _record(
        self,
        capture: Capture,
        func: Any,
        given: Any,
        fills: Sequence[Tensor],
        reads: Sequence[Memory],
        writes: Sequence[Memory],
    ) -> None:
        with function_off(), _disable_current_modes():
            recorded, outputs = tree_map_only(Tensor, self.place, (given, list(fills)))

        def again() -> None:
            with function_off(), _disable_current_modes():
                (args, kwargs), own = _opened((recorded, outputs))
                made = func(*args, **kwargs)
                if own:
                    tensors = [x for x in tree_leaves(made) if isinstance(x, Tensor)]
                    for mine, new in zip(own, tensors, strict=True):
                        mine.copy_(new)
            self.launch(f"replayed {func.overloadpacket.__name__}", reads, writes)

        capture.graph.launches.append(again)

    def _seen(self, args: Any, kwargs: Any) -> list[Memory]:
        found = (self.of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        return [memory for memory in found if memory is not None]

    def _accesses(self, func: Any, args: Any, kwargs: Any) -> tuple[list[Memory], list[Memory]]:
        reads: list[Memory] = []
        writes: list[Memory] = []
        name = func._schema.name
        sizes_only = name.rsplit("::", 1)[-1].startswith("new_") or name.endswith("_like")
        for argument, value in zip_arguments(func._schema, args, kwargs):
            held = self._seen(value, {})
            if _is_write(argument):
                writes += held
                if not (argument.kwarg_only or name in ("aten::copy_", "aten::fill_", "aten::zero_")):
                    reads += held
            elif argument.alias_info is None and not sizes_only:
                reads += held
        return reads, writes


def _is_write(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def _opened(given: Any) -> Any:
    return tree_map_only(Place, Place.tensor, given)


class _Pointers:
    """The interpreter's own memory accesses, which are noted on the way.

    Args:
        kernel: its name.
        memories: what lies on the device.
    """

    def __init__(self, kernel: str, memories: Iterable[Memory]) -> None:
        self._kernel = kernel
        self._real = interpreter._interpreter
        spans = [(m.storage.data_ptr(), m.storage.nbytes(), m) for m in memories if m.storage.nbytes()]
        spans.sort(key=lambda span: span[0])
        self._begins = np.array([begin for begin, _, _ in spans], dtype=np.uint64)
        self._ends = np.array([begin + size for begin, size, _ in spans], dtype=np.uint64)
        self._held = [memory for _, _, memory in spans]
        self.reads: set[Memory] = set()
        self.writes: set[Memory] = set()

    def _note(self, found: set[Memory], pointers: Any, mask: Any) -> None:
        at = np.asarray(pointers)[np.asarray(mask, dtype=bool)].astype(np.uint64)
        if not at.size:
            return
        place = np.searchsorted(self._begins, at, side="right") - 1
        if (place < 0).any() or (at >= self._ends[place]).any():
            raise OrderError(f"{self._kernel} goes to memory that is not the device's, or is freed")
        found.update(self._held[k] for k in np.unique(place))

    def load(self, pointers: Any, mask: Any, *rest: Any) -> Any:
        self._note(self.reads, pointers, mask)
        return self._real.load(pointers, mask, *rest)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        self._note(self.writes, pointers, mask)
        return self._real.store(pointers, value, mask)

    def atomic_rmw(self, op: Any, pointers: Any, value: Any, mask: Any, order: Any) -> Any:
        for found in (self.reads, self.writes):
            self._note(found, pointers, mask)
        return self._real.atomic_rmw(op, pointers, value, mask, order)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _Ops(TorchDispatchMode):
    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with function_off():
            return self._gpu.run_op(func, args, kwargs or {})


class _Devices(TorchFunctionMode):
    """Has tensors say that they are on the device, and makes those that are asked for there."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, kwargs, name = self._gpu, dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "__get__":
            asked = getattr(func.__self__, "__name__", "")
            if asked in ("device", "is_cuda", "is_cpu") and gpu.is_on(args[0]):
                return {"device": CUDA, "is_cuda": True, "is_cpu": False}[asked]
        elif name in ("tolist", "numpy") and gpu.is_on(args[0]):
            gpu.host_waits(name)
        elif name in ("to", "cpu", "cuda"):
            return self._move(func, name, args, kwargs)
        elif name == "pin_memory" and not gpu.is_pinned(args[0]):
            with gpu.wanting("pinned"):
                return args[0].clone()
        elif name in ("pin_memory", "is_pinned"):
            return args[0] if name == "pin_memory" else gpu.is_pinned(args[0])
        asked = kwargs.get("device")
        pinned = bool(kwargs.pop("pin_memory", False))
        if not (isinstance(asked, torch.device | str | int) or pinned):  # a tracer's may be unknown yet
            return func(*args, **kwargs)
        kind = "pinned" if pinned else torch.device(asked).type
        if kind == "cuda":
            kwargs["device"] = "cpu"
        with gpu.wanting(kind):
            made = func(*args, **kwargs)
        if name in ("tensor", "as_tensor") and kind in ("cuda", "pinned"):
            memory = gpu.adopt(made, kind == "pinned")
            assert memory is not None
            if kind == "cuda":
                gpu.launch(name, [], [memory])
                gpu.host_waits(name)
        return made

    def _move(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        gpu, tensor = self._gpu, args[0]
        targets = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.device | str)]
        targets += [torch.device(name)] if name != "to" else []
        kind = torch.device(targets[0]).type if targets else ""
        if not targets or kind == "meta" or (kind == "cuda") == gpu.is_on(tensor):
            if name == "cuda":
                return tensor
            if kind == "cuda":  # where it says that it is
                here = torch.device("cpu")
                args, kwargs = tree_map_only(torch.device | str, lambda _: here, (args, kwargs))
            return func(*args, **kwargs)
        others = [x for x in args[1:] if isinstance(x, torch.dtype)] + [tensor.dtype]
        with gpu.wanting(kind):
            made = torch.empty_like(tensor, dtype=kwargs.get("dtype", others[0]), device=torch.device("cpu"))
            return made.copy_(tensor, non_blocking=bool(kwargs.get("non_blocking", False)))


@contextmanager
def _language() -> Iterator[None]:
    """Triton's language stays the interpreter's meanwhile: to change it takes longer than a small kernel."""
    change, scopes = interpreter._patch_lang, {}

    def once(fn: Any) -> Any:
        found = frozenset(id(value) for value in fn.__globals__.values() if value in (tl, tl.core))
        if found not in scopes:
            scopes[found] = change(fn)
        return SimpleNamespace(restore=lambda: None)

    with patch.object(interpreter, "_patch_lang", once):
        yield
    for scope in reversed(scopes.values()):
        scope.restore()


@contextmanager
def on_gpu() -> Iterator[FakeGpu]:
    """Code within finds a GPU; raises the errors that were found in the end."""
    gpu = FakeGpu()
    run = interpreter.GridExecutor.__call__
    parts: dict[str, Any] = {
        "Stream": gpu.draw,
        "Event": lambda *_, **__: Event(gpu),
        "CUDAGraph": lambda *_: Graph(gpu),
        "current_stream": gpu.current,
        "set_stream": gpu.set_stream,
        "stream": gpu.stream,
        "synchronize": gpu.synchronize,
        "_sleep": lambda _: None,
        "set_sync_debug_mode": gpu.set_sync_debug_mode,
        "is_available": lambda: True,
        "is_current_stream_capturing": gpu.capturing,
        "graph_pool_handle": Pool,
        "get_device_properties": lambda _: SimpleNamespace(total_memory=2**40),
        "memory_reserved": lambda _: 0,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "set_device": lambda _: None,
        # Random numbers are the host's, which fork and seed theirs beside a device's.
        "get_rng_state": lambda _: torch.empty(0, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "manual_seed": lambda _: None,
        "manual_seed_all": lambda _: None,
        "device": lambda _: nullcontext(),
        "empty_cache": lambda: None,
    }
    with ExitStack() as patches:
        for name, part in parts.items():
            patches.enter_context(patch.object(torch.cuda, name, part))
        for module, name, part in (
            (torch._C, "_host_emptyCache", lambda: None),
            (torch.autograd, "_engine_run_backward", gpu.run_backward),
            (Tensor, "record_stream", lambda tensor, stream: gpu.used_by(tensor, stream)),
            (recorder, "_cuda_endAllocateToPool", gpu.end_allocation),
            (recorder, "_cuda_releasePool", lambda *_: None),
            (recorder, "_broken", []),
            (streams, "_own", {}),
            (streams, "_free", {}),
            (streams, "_drawn", set()),
            (streams, "_lent", Counter()),
            (verdict, "_pending", deque()),
            (interpreter.GridExecutor, "__call__", lambda grid, *a, **k: gpu.run_kernel(run, grid, a, k)),
        ):
            patches.enter_context(patch.object(module, name, part, create=True))
        gc.freeze()  # what was there before need not be looked through in the end
        patches.callback(gc.unfreeze)
        with _language(), gpu.seeing():
            yield gpu
            verdict.poll(wait=True)
        gc.collect()
    if gpu.errors:
        raise gpu.errors[0]
