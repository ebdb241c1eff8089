"""Optimizers attached to a parameter by ``apply_optimizer_in_backward``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.optim.apply_optimizer_in_backward import param_to_optim_hook_handle_map

from recemb.errors import ConfigError

_NAMES = {"learning_rate": "lr"}  # fbgemm's for torch's
# torchrec's classes that only fbgemm can step, as torch's with fbgemm's defaults.
_WORKING: dict[str, tuple[type[torch.optim.Optimizer], Mapping[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.01}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.01, "eps": 1e-8}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "eps": 1e-8, "betas": (0.9, 0.999)}),
}


def attached_to(parameter: Tensor) -> list[torch.optim.Optimizer]:
    """The optimizers attached to a parameter, none for most.

    ``torchrec.optim.SGD``, ``Adagrad`` and ``Adam`` are names for fbgemm to read, without settings, state or
    a step. They are replaced by torch's optimizers of those names here, for good.

    Raises:
        ConfigError: another such name, or an argument of fbgemm's that torch's optimizer does not have.
    """
    found: list[torch.optim.Optimizer] = getattr(parameter, "_in_backward_optimizers", [])
    for k, optimizer in enumerate(found):
        if not hasattr(optimizer, "param_groups"):
            # What has been asked for stays beside it, for fbgemm.
            found[k] = _working(optimizer, parameter)
    return found


def live_hooks(parameter: Tensor) -> list[tuple[Mapping[int, Any], int]]:
    """The hooks that step a parameter's optimizers in its backward: where torch keeps each, under which id.

    None with ``register_hook=False``, nor once they are removed, as DistributedDataParallel does: it steps
    after its exchange of gradients.
    """
    handles = param_to_optim_hook_handle_map.get(parameter, ())  # type: ignore[no-untyped-call]
    kept = [(handle.hooks_dict_ref(), handle.id) for handle in handles]
    return [(hooks, own) for hooks, own in kept if hooks is not None and own in hooks]


def stepping(parameter: Tensor) -> list[torch.optim.Optimizer]:
    """Those attached to a parameter that step in its backward: none while no hook does."""
    attached = attached_to(parameter)
    return attached if attached and live_hooks(parameter) else []


def _working(placeholder: torch.optim.Optimizer, parameter: Tensor) -> torch.optim.Optimizer:
    """What steps as a class of torchrec's asks."""
    name, given = type(placeholder).__name__, getattr(placeholder, "_kwargs", {})
    if name not in _WORKING or not type(placeholder).__module__.startswith("torchrec."):
        raise ConfigError(
            f"{type(placeholder).__module__}.{name}, attached to a parameter of a table, cannot step outside "
            "of fbgemm; use torch.optim.SGD, Adagrad or Adam, or torchrec.optim.RowWiseAdagrad"
        )
    kind, defaults = _WORKING[name]
    arguments = {_NAMES.get(key, key): value for key, value in given.items()}
    if "betas" in defaults:
        betas = arguments.get("betas", defaults["betas"])
        arguments["betas"] = tuple(arguments.pop(f"beta{k + 1}", beta) for k, beta in enumerate(betas))
    # Those that ask for nothing may stand there.
    unknown = {key: value for key, value in arguments.items() if key not in defaults and value}
    if unknown:
        raise ConfigError(
            f"torchrec.optim.{name}, attached to a parameter of a table, has {unknown}, which fbgemm alone "
            f"knows; leave out all but {', '.join(defaults)}"
        )
    return kind([parameter], **{key: arguments.get(key, value) for key, value in defaults.items()})
