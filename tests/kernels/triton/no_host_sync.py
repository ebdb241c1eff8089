"""Code for a GPU, run on a CPU, that would make the host wait for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "unique",
    "masked_select",
    "is_nonzero",
    "bincount",
    "equal",
    "allclose",
)


def what_waits(func: Any, args: Any, kwargs: Any) -> str:
    """How an operation makes the host wait for a value or a size, or nothing."""
    name = func.overloadpacket.__name__
    if any(name.startswith(word) or name == f"_{word}2" for word in _WAITING):
        return name
    masks = [x for x in tree_leaves(args[1:2]) if isinstance(x, Tensor) and x.dtype is torch.bool]
    if name.lstrip("_").startswith("index") and masks:
        return f"{name} by a mask"
    if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
        return f"{name} without a size"
    return ""


class NoHostSync(TorchDispatchMode):
    """Raises where an operation would wait for the device to learn a value or a size.

    Args:
        host: tensors that lie on the host whatever the device is.
    """

    # On a CPU these reach no dispatcher.
    _READING = ("tolist", "numpy", "cpu")

    def __init__(self, host: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._host = [tensor.data_ptr() for tensor in host]
        self._patches = ExitStack()

    def __enter__(self) -> Self:
        for name in self._READING:
            self._patches.enter_context(patch.object(Tensor, name, self._guarded(getattr(Tensor, name))))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def _guarded(self, read: Callable[..., Any]) -> Callable[..., Any]:
        """Refuses our modules; Triton's interpreter reads on the host what a GPU reads itself."""

        def guarded(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            ours = sys._getframe(1).f_globals["__name__"].startswith("recemb")
            if ours and tensor.data_ptr() not in self._host:
                raise AssertionError(f"{read.__name__} waits for the device")
            return read(tensor, *args, **kwargs)

        return guarded

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        what = what_waits(func, args, kwargs)
        if what and args[0].data_ptr() not in self._host:
            raise AssertionError(f"{what} waits for the device")
        return func(*args, **(kwargs or {}))
