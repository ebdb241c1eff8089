"""The interpreter adds the products of float32 up as a GPU does, and others no better; and it looks its own
names up once.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from triton import language
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_is_builtin = language.core.is_builtin


@cache
def _builtins(package: Any) -> tuple[str, ...]:
    return tuple(name for name, member in inspect.getmembers(package) if _is_builtin(member))


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    """As the interpreter's own, which lists a package at every launch and at every call of a function."""
    for name in _builtins(package):
        if _is_builtin(member := getattr(package, name)):
            interpreter._patch_attr(package, name, member, builder, scope)


@pytest.fixture(autouse=True)
def _names_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the interpreter's time."""
    monkeypatch.setattr(interpreter, "_patch_builtin", _patch_builtin)


@pytest.fixture(autouse=True)
def _products_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of matrices is a chain of fused multiply-adds over K, which rounds more than numpy's sums."""

    def create_dot(_: Any, a: Any, b: Any, total: Any, *__: Any) -> Any:
        left, right = a.data.astype(np.float64), b.data.astype(np.float64)
        added = total.data
        for k in range(left.shape[1]):
            added = (left[:, k, None] * right[None, k] + added).astype(np.float32)
        return TensorHandle(added, total.dtype.scalar)

    if not torch.cuda.is_available():
        monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
