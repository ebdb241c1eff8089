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

Kind = tuple[Any, ...]
# The kind of batch, whether a backward comes, and the parameters' addresses.
Shape = tuple[Kind, bool, tuple[int, ...]]


def kind_of(batch: Batch) -> Kind:
    """Sizes, types and precision: batches of a kind are planned alike, whatever tables hold."""
    weights = None if batch.weights is None else batch.weights.dtype
    return batch.ids.numel(), batch.size, weights, batch.refused is None, precision(torch.float32)


def shape_of(parameters: Sequence[Tensor], batch: Batch, keep: bool) -> Shape:
    """The shape of a look-up of a batch in all of a group's parameters; ``keep`` when a backward comes."""
    return kind_of(batch), keep, tuple(parameter.data_ptr() for parameter in parameters)


def who(device: torch.device) -> tuple[int, int]:
    """Thread and stream, which have graphs of their own: nothing orders what one does after the other."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return get_ident(), stream


def step_of(update: Update | None) -> Any:
    """What the launches of a step depend on; equal and hashable where they are alike."""
    if update is None:
        return None
    states = [None if s is None else (s.data_ptr(), s.dtype) for s in (*update.state, *update.state2)]
    return update.kind, update.left, tuple(states)
