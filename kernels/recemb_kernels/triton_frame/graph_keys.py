"""What a CUDA graph is captured for: whatever its launches depend on."""

from __future__ import annotations

from collections.abc import Sequence
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from recemb_kernels.digit_tree.group import Batch
from recemb_kernels.triton_frame.elements import precision
from recemb_kernels.update import Update

# The kind of batch, whether a backward comes, and the parameters' addresses.
Shape = tuple[tuple[Any, ...], bool, tuple[int, ...]]
Who = tuple[int, int]


def shape_of(parameters: Sequence[Tensor], batch: Batch, keep: bool) -> Shape:
    """The shape of a look-up.

    Args:
        parameters: all of its group.
        batch: of its kind are all with equal sizes, types and precision, whose plans are made alike.
        keep: whether a backward comes.
    """
    weights = None if batch.weights is None else batch.weights.dtype
    kind = batch.ids.numel(), batch.size, weights, batch.refused is None, precision(torch.float32)
    return kind, keep, tuple(parameter.data_ptr() for parameter in parameters)


def who(device: torch.device) -> Who:
    """Thread and stream, which have graphs of their own: nothing orders what one does after the other."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return get_ident(), stream


def step_of(update: Update | None) -> Any:
    """What the launches of a step depend on; equal and hashable where they are alike."""
    if update is None:
        return None
    states = [None if s is None else (s.data_ptr(), s.dtype) for s in (*update.state, *update.state2)]
    return update.kind, update.left, tuple(states)
