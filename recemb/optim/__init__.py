"""Fused updates: optimizers attached by ``apply_optimizer_in_backward``, applied inside the backward kernel.

torch's idiom stays as it is::

    from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
    apply_optimizer_in_backward(torchrec.optim.RowWiseAdagrad, ebc.parameters(), {"lr": 0.01})

Where a kernel can do the step itself, the gradient is never materialised and torch's hook never fires; the
optimizer object keeps its state, its ``param_groups`` (learning-rate schedules act on them) and its state
dict. Everywhere else the gradient is accumulated and the hook steps, as in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from recemb.optim.adagrad import adagrad_update
from recemb.optim.adam import adam_update
from recemb.optim.rowwise_adagrad import is_rowwise_adagrad, rowwise_adagrad_update
from recemb.optim.sgd import sgd_update
from recemb_kernels.update import Update

_Rule = Callable[[Sequence[torch.optim.Optimizer], Sequence[nn.Parameter]], Update]
# These move rows that the batch does not touch, or ascend.
_NOT_FUSED = ("momentum", "weight_decay", "amsgrad", "maximize")


def fused_update(parameters: Sequence[nn.Parameter]) -> Callable[[], Update] | None:
    """What makes the update that the parameters' in-backward optimizers ask for, once per backward.

    Calling it reads the learning rate of that moment.

    Returns:
        ``None`` when there is no such optimizer, when the parameters' optimizers differ in class or
        settings, or when one has an option (momentum, weight decay, ...) that touches more than the rows
        of the batch.
    """
    optimizers: list[torch.optim.Optimizer] = []
    first: dict[str, Any] = {}
    for parameter in parameters:
        attached: Sequence[torch.optim.Optimizer] = getattr(parameter, "_in_backward_optimizers", ())
        if len(attached) != 1:
            return None
        (optimizer,) = attached
        (group,) = optimizer.param_groups
        if not optimizers:
            first = group
        elif type(optimizer) is not type(optimizers[0]) or not _same_settings(group, first):
            return None
        optimizers.append(optimizer)
    if not optimizers or any(first.get(option) for option in _NOT_FUSED):
        return None
    rule = _rule(optimizers[0])
    return None if rule is None else partial(rule, optimizers, parameters)


def _same_settings(group: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(value == other.get(key) for key, value in group.items() if key != "params")


def _rule(optimizer: torch.optim.Optimizer) -> _Rule | None:
    if type(optimizer) is torch.optim.SGD:
        return sgd_update
    if type(optimizer) is torch.optim.Adagrad:
        return adagrad_update
    if type(optimizer) is torch.optim.Adam:
        return adam_update
    return rowwise_adagrad_update if is_rowwise_adagrad(optimizer) else None
