"""Optimizer state as the kernels step on it: written in place, so its layout matters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recemb.errors import ConfigError
from recemb_kernels.memory import move_to_huge_pages


def in_place(
    states: Sequence[dict[str, Any]], name: str, parameters: Sequence[nn.Parameter], *, row_wise: bool = False
) -> list[Tensor]:
    """``state[name]`` of every parameter, when the fused step can write to it.

    Args:
        states: one optimizer state per parameter.
        name: which of its tensors; each has the parameter's shape.
        row_wise: each has one number a row instead, [N, 1].

    Raises:
        ConfigError: a tensor is not float32 (or of the parameter's own type, on a GPU), contiguous, on the
            parameter's device and of that shape, or is missing, for example after loading another optimizer's
            state. No weight has changed.
    """
    found = []
    for state, parameter in zip(states, parameters, strict=True):
        if name not in state:
            raise ConfigError(
                f"an in-backward optimizer has a state of {sorted(state)} and no {name!r}: load a state of "
                "the same optimizer"
            )
        tensor = state[name]
        rows, columns = parameter.shape
        expected = rows if row_wise else rows * columns
        fits = tensor.numel() == expected and tensor.shape[0] == rows and tensor.is_contiguous()
        typed = tensor.dtype in (torch.float32, parameter.dtype) and tensor.device == parameter.device
        if not (fits and typed):
            raise ConfigError(
                f"an in-backward optimizer has a state {name!r} of {tensor.dtype}, shape "
                f"{tuple(tensor.shape)} and strides {tensor.stride()} on {tensor.device} for a parameter of "
                f"shape {tuple(parameter.shape)}; the fused step needs contiguous float32 on "
                f"{parameter.device}, {'one number a row' if row_wise else 'of that shape'}: load a state of "
                "the same optimizer"
            )
        move_to_huge_pages(tensor)
        found.append(tensor)
    return found


def counters(states: Sequence[dict[str, Any]]) -> list[Tensor]:
    """``state["step"]`` of every parameter as a float32 tensor, which the fused step counts on."""
    for state in states:
        step = state["step"]
        # torch makes it in the default dtype, and older checkpoints hold a number.
        if not (
            isinstance(step, Tensor) and step.dtype is torch.float32 and step.is_cpu and step.numel() == 1
        ):
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device="cpu")
    return [state["step"] for state in states]


def settings_of(group: dict[str, Any]) -> dict[str, Any]:
    """A param group as it is now: lists, such as Adam's betas from a file, are changed in place."""
    return {
        key: list(value) if type(value) is list and key != "params" else value for key, value in group.items()
    }


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor has been written to; ``None`` for one of inference mode, which does not count."""
    return None if tensor.is_inference() else tensor._version
