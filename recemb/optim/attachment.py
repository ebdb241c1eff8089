"""An optimizer of a parameter as what can be attached to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim.apply_optimizer_in_backward import (
    _apply_optimizer_in_backward as apply_optimizer_in_backward,
)

from recemb.errors import ConfigError
from recemb.optim.adam import LazyAdam, kind_of
from recemb.optim.attached import attached_to

_TRIAL = (2, 3)  # rows and columns, which no other number of a state's shape is taken for


@dataclass(frozen=True, eq=False)
class Attachment:
    """An optimizer that ``apply_optimizer_in_backward`` attached to a parameter, to be attached to another.

    Attributes:
        kind: its class.
        arguments: what it was made with.
        settings: its parameter group, which a schedule may have changed since.
    """

    kind: type[torch.optim.Optimizer]
    arguments: Mapping[str, Any]
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, key: str, parameter: nn.Parameter) -> Attachment | None:
        """What is attached to ``parameter``.

        Raises:
            ConfigError: more than one optimizer is.
        """
        attached = attached_to(parameter)
        if not attached:
            return None
        if len(attached) > 1:
            raise ConfigError(
                f"{key} has {len(attached)} optimizers attached; call apply_optimizer_in_backward once for it"
            )
        kind = kind_of(attached[0])
        # Of a name that torchrec has for fbgemm alone the settings say all.
        known = parameter._optimizer_classes[0] is kind  # type: ignore[attr-defined] # torch's idiom
        arguments = dict(parameter._optimizer_kwargs[0]) if known else {}  # type: ignore[attr-defined]
        # torchrec rewrites the caller's dict for fbgemm when it shards another collection that shares it.
        if "learning_rate" in arguments:
            arguments["lr"] = arguments.pop("learning_rate")
        arguments.pop("optimizer", None)
        settings = {name: value for name, value in attached[0].param_groups[0].items() if name != "params"}
        return cls(kind, arguments, settings)

    def attach(self, parameter: nn.Parameter, lazy: bool) -> None:
        """Attach an optimizer of this kind and these settings, with fresh state.

        Args:
            lazy: whether Adam is to move the rows with a gradient alone where no kernel takes its step.
        """
        kind = LazyAdam if lazy and self.kind is torch.optim.Adam else self.kind
        apply_optimizer_in_backward(kind, [parameter], dict(self.arguments))
        (optimizer,) = parameter._in_backward_optimizers  # type: ignore[attr-defined] # torch's idiom
        optimizer.param_groups[0].update(self.settings)

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """State as its first step on a parameter would make it, of zeros.

        The step is taken on a parameter of a few numbers in its place.
        """
        # Wherever it is loaded: training goes on with these tensors.
        with torch.inference_mode(False):
            trial = nn.Parameter(parameter.new_zeros(_TRIAL))
            # Not attached: torch would keep it for good.
            optimizer = self.kind([trial], **self.arguments)
            optimizer.param_groups[0].update(self.settings)
            trial.grad = torch.zeros_like(trial)
            optimizer.step()
            sizes = dict(zip(_TRIAL, parameter.shape, strict=True))
            return {
                name: value.new_zeros([sizes.get(n, n) for n in value.shape])
                if isinstance(value, Tensor)
                else value
                for name, value in optimizer.state[trial].items()
            }
