"""Whether gradients have been accumulated that no optimizer has stepped on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recemb.optim.attached import stepping


class BeforeStep:
    """Parameters as they were at a backward, to see later whether an optimizer has stepped since.

    A gradient that is still there says nothing: many loops clear it after the forward. Values that have
    changed do, but a copy of them is as large as the parameters: it is made at a backward that an exchange of
    rows is due after. From any other an exchange is parted by a look-up at least, whose own backward makes
    the copy; where that graph is dropped, the version of each tensor has to do. torch's fused optimizers do
    not raise it: if one has stepped then and its gradients are still there, the exchange waits for the next
    backward and step, never the other way round.

    Parameters that are stepped in their backward accumulate nothing, and frozen ones are not stepped.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[nn.Parameter, int, Tensor | None]] = []

    def __getstate__(self) -> dict[str, object]:
        # Gradients do not go into copies either.
        return {"_seen": []}

    def note(self, parameters: Sequence[nn.Parameter], copies: dict[nn.Parameter, Tensor] | None) -> None:
        """Keep what some parameters are, and forget others.

        Args:
            parameters: of one table; frozen ones are left out.
            copies: values of parameters as they are now, to which those that are missing are added; ``None``
                where no exchange of rows is due, which makes none.
        """
        self._seen = []
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            values = None
            if copies is not None and not stepping(parameter):
                if parameter not in copies:
                    copies[parameter] = parameter.detach().clone()
                values = copies[parameter]
            self._seen.append((parameter, parameter._version, values))

    def forget(self) -> None:
        """Keep nothing."""
        self._seen = []

    def pending(self) -> list[nn.Parameter]:
        """Those that have a gradient, unless one such has moved; reads from the device."""
        held = []
        for parameter, version, values in self._seen:
            if parameter.grad is None or stepping(parameter) or not bool(parameter.grad.any()):
                continue
            same = parameter._version == version if values is None else torch.equal(parameter, values)
            if not same:
                return []
            held.append(parameter)
        return held
