"""Whether gradients have been accumulated that no optimizer has stepped on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class BeforeStep:
    """Parameters as they were at a backward, to see later whether an optimizer has stepped since.

    A gradient that is still there says nothing: many loops clear it after the forward. Neither does a
    tensor's version: torch's fused optimizers do not raise it. So the values are kept, of parameters without
    an optimizer in their backward, from every backward: between one and an exchange of rows there may be
    nothing but graphs that are dropped.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[nn.Parameter, Tensor]] = []

    def __getstate__(self) -> dict[str, object]:
        # Gradients do not go into copies either.
        return {"_seen": []}

    def note(self, parameters: Sequence[nn.Parameter]) -> None:
        """Keep the values of some parameters, and forget others."""
        stepped_outside = [p for p in parameters if not getattr(p, "_in_backward_optimizers", None)]
        self._seen = [(p, p.detach().clone()) for p in stepped_outside]

    def pending(self) -> bool:
        """Whether one of them has a gradient, and none has moved; reads from the device."""
        held = [
            (parameter, before)
            for parameter, before in self._seen
            if parameter.grad is not None and bool(parameter.grad.any())
        ]
        return bool(held) and all(torch.equal(parameter, before) for parameter, before in held)
