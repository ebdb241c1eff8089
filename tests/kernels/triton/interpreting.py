"""Fixtures of tests whose kernels are interpreted, for a folder's ``conftest.py`` to import.

The interpreter adds the products of float32 up as a GPU does, and others no better; and it does nothing that
no test sees.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from triton import language
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder

from tests.kernels.triton.products import dot_of

_is_builtin = language.core.is_builtin
_find_numpy_type = interpreter._get_np_dtype
_numpy_types: dict[str, Any] = {}


@cache
def _builtins(package: Any) -> tuple[str, ...]:
    return tuple(name for name, member in inspect.getmembers(package) if _is_builtin(member))


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    """As the interpreter's own, which lists a package at every launch and at every call of a function."""
    for name in _builtins(package):
        if _is_builtin(member := getattr(package, name)):
            interpreter._patch_attr(package, name, member, builder, scope)


def _numpy_type(dtype: Any) -> Any:
    """As the interpreter's own, which makes a table of all types each time; a block's is its elements'."""
    name = dtype.scalar.name
    if name not in _numpy_types:
        _numpy_types[name] = _find_numpy_type(dtype)
    return _numpy_types[name]


@pytest.fixture(autouse=True)
def without_idle_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes more than half of the interpreter's time."""
    monkeypatch.setattr(interpreter, "_patch_builtin", _patch_builtin)
    monkeypatch.setattr(interpreter, "_get_np_dtype", _numpy_type)
    # Sums of int32 are made a second time, in int64, for an assertion that is dropped where nobody debugs.
    builder = interpreter.interpreter_builder
    options = replace(builder.options, sanitize_overflow=builder.options.debug)
    monkeypatch.setattr(builder, "options", options)


@pytest.fixture(autouse=True)
def products_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU's, which round more than numpy's."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(InterpreterBuilder, "create_dot", dot_of())
