"""Optimizer state as the kernels can step on it: written in place, so its layout matters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recemb.errors import ConfigError


def in_place(state: Sequence[Tensor]) -> Sequence[Tensor]:
    """``state`` itself, when the fused step can write to it.

    Raises:
        ConfigError: a tensor is not float32, contiguous and on the CPU, for example after loading a state
            that was saved under another default dtype. No weight has changed.
    """
    for tensor in state:
        if tensor.dtype is not torch.float32 or not (tensor.is_cpu and tensor.is_contiguous()):
            raise ConfigError(
                f"an in-backward optimizer has state of {tensor.dtype}, shape {tuple(tensor.shape)} and "
                f"strides {tensor.stride()} on {tensor.device}; the fused step needs contiguous float32 on "
                "the CPU: convert it with .float().contiguous(), or load it into a fresh optimizer"
            )
    return state
