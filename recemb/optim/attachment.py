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
        return cls._number(0, parameter)

    @classmethod
    def _number(cls, k: int, parameter: nn.Parameter) -> Attachment:
        optimizer = attached_to(parameter)[k]
        kind = kind_of(optimizer)
        # Of a name that torchrec has for fbgemm alone the settings say all.
        known = parameter._optimizer_classes[k] is kind  # type: ignore[attr-defined] # torch's idiom
        arguments = dict(parameter._optimizer_kwargs[k]) if known else {}  # type: ignore[attr-defined]
        # torchrec rewrites the caller's dict for fbgemm when it shards another collection that shares it.
        if "learning_rate" in arguments:
            arguments["lr"] = arguments.pop("learning_rate")
        arguments.pop("optimizer", None)
        settings = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
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

    def diverges(self, dtype: torch.dtype) -> bool:
        """Whether its first step makes NaN or infinity of weights of a type, by the smallest gradients.

        The step is taken on a parameter of a few numbers on the CPU. Where it fails there, as with settings
        for a GPU, it is taken to of torch's and torchrec's optimizers, and not to of others.
        """
        with torch.inference_mode(False), torch.no_grad():
            trial = nn.Parameter(torch.ones(_TRIAL, dtype=dtype, device="cpu"))
            trial.grad = torch.zeros_like(trial)
            # One of those that a type has, and whose square it has not.
            trial.grad[0, 0] = torch.finfo(dtype).smallest_normal
            try:
                optimizer = self.kind([trial], **self.arguments)
                optimizer.param_groups[0].update(self.settings)
                optimizer.step()
            except Exception:  # of whatever class it is
                return self.kind.__module__.startswith(("torch.", "torchrec."))
            return not bool(torch.isfinite(trial).all())

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


def check_eps(name: str, parameter: nn.Parameter) -> None:
    """That no optimizer of a parameter which torch steps has an ``eps`` that is 0 in the type of its state.

    A denominator of 0 + ``eps`` is of every element whose gradients, or their squares, have been 0 so far.

    Args:
        name: names the parameter in errors.
        parameter: of a table.

    Raises:
        ConfigError: one has, as 1e-10 and 1e-8 in float16, the type of the parameter and of torch's states.
            Of an ``eps`` of 0 nothing is said, nor of sums that start above 0, nor of an optimizer that
            computes in a wider type.
    """
    for k, optimizer in enumerate(attached_to(parameter)):
        group = optimizer.param_groups[0]
        eps, start = (group.get(key, 0) for key in ("eps", "initial_accumulator_value"))
        if not (isinstance(eps, float) and eps > 0):
            continue
        rounded = torch.tensor([eps, float(start)], dtype=parameter.dtype, device="cpu")
        if not bool(rounded.any()) and Attachment._number(k, parameter).diverges(parameter.dtype):
            raise ConfigError(
                f"{name} is {parameter.dtype}, in which {type(optimizer).__name__}'s eps={eps:g} is 0, and "
                "it divides by that where gradients are small: weights would become NaN. None has changed; "
                "give the optimizer a larger one, e.g. eps=1e-4, or the table data_type=DataType.BF16"
            )
