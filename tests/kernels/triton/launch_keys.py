"""What a GPU would compile for the launches that the interpreter runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import triton.language as tl
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import native_specialize_impl

from recemb_kernels.triton_frame.elements import STAGES


@dataclass(frozen=True)
class Launch:
    """One kernel as Triton would compile it for a launch; launches that are equal share it.

    Attributes:
        module: where the kernel is defined.
        name: the kernel's.
        constants: name and value of every ``tl.constexpr``.
        arguments: name, Triton's type (``constexpr`` of what it makes a constant), and what it takes for
            granted: such a constant's value, or ``"D"`` of a multiple of 16.
        num_warps: of a block.
        num_stages: of its pipelines.
    """

    module: str
    name: str
    constants: tuple[tuple[str, Any], ...]
    arguments: tuple[tuple[str, str, Any], ...]
    num_warps: int
    num_stages: int


class Compiled:
    """Collects the launches of a ``with`` block in ``found``."""

    def __init__(self) -> None:
        self.found: set[Launch] = set()

    def __enter__(self) -> Compiled:
        self._patch = patch.object(InterpretedFunction, "run", self._seen_by(InterpretedFunction.run))
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()

    def _seen_by(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def seen(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
            fixed = {name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)}
            plain, unaligned = (
                kernel.kwargs.get(f"do_not_specialize{what}") or () for what in ("", "_on_alignment")
            )
            specialised = {
                name: native_specialize_impl(
                    CUDABackend, given[name], False, name not in plain, name not in unaligned
                )
                for name in kernel.arg_names
                if name not in fixed
            }
            self.found.add(
                Launch(
                    kernel.fn.__module__,
                    kernel.fn.__name__,
                    tuple((name, _plain(given[name])) for name in sorted(fixed)),
                    tuple((name, kind, granted) for name, (kind, granted) in specialised.items()),
                    kwargs["num_warps"],
                    kwargs.get("num_stages", STAGES),
                )
            )
            return run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

        return seen


def _plain(value: Any) -> Any:
    """A value that JSON has: Triton's types are ``tl.`` and a name."""
    return f"tl.{value.name}" if isinstance(value, tl.dtype) else value
