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

import torch
from torch import nn

from recemb.optim.adagrad import adagrad_update
from recemb.optim.adam import adam_update
from recemb.optim.rowwise_adagrad import is_rowwise_adagrad, rowwise_adagrad_update
from recemb.optim.sgd import sgd_update
from recemb_kernels.update import Update

_Rule = Callable[[Sequence[torch.optim.Optimizer], Sequence[nn.Parameter]], Update]


def fused_update(parameters: Sequence[nn.Parameter]) -> Callable[[], Update] | None:
    """What makes the update that the parameters' in-backward optimizers ask for, once per backward.

    Calling it counts a step and reads the learning rate of that moment.

    Returns:
        ``None`` when there is no such optimizer, when the parameters' optimizers differ in class or
        settings, or when one has an option (momentum, weight decay, ...) that touches more than the rows
        of the batch.
    """
    optimizers: list[torch.optim.Optimizer] = []
    for parameter in parameters:
        attached: Sequence[torch.optim.Optimizer] = getattr(parameter, "_in_backward_optimizers", ())
        if len(attached) != 1:
            return None
        optimizers.append(attached[0])
    if not optimizers or any(_settings(other) != _settings(optimizers[0]) for other in optimizers):
        return None
    rule = _rule(optimizers[0])
    return None if rule is None else partial(rule, optimizers, parameters)


def _settings(optimizer: torch.optim.Optimizer) -> tuple[object, ...]:
    (group,) = optimizer.param_groups
    return type(optimizer), {key: value for key, value in group.items() if key != "params"}


def _rule(optimizer: torch.optim.Optimizer) -> _Rule | None:
    group = optimizer.param_groups[0]
    # These move rows that the batch does not touch, or ascend.
    if any(group.get(option) for option in ("momentum", "weight_decay", "amsgrad", "maximize")):
        return None
    if type(optimizer) is torch.optim.SGD:
        return sgd_update
    if type(optimizer) is torch.optim.Adagrad:
        return adagrad_update
    if type(optimizer) is torch.optim.Adam:
        return adam_update
    return rowwise_adagrad_update if is_rowwise_adagrad(optimizer) else None
