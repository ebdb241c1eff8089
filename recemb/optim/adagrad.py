"""Adagrad (Duchi et al., 2011), element-wise: s += g**2, w -= lr * g / (sqrt(s) + eps)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from recemb_kernels.update import Kind, Update


def adagrad_update(optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[nn.Parameter]) -> Update:
    """``torch.optim.Adagrad``; rows without a gradient would not change under it either."""
    group = optimizers[0].param_groups[0]
    step = count_step(optimizers, parameters)
    return Update(
        Kind.ADAGRAD,
        lr=float(group["lr"]) / (1 + (step - 1) * group["lr_decay"]),
        eps=group["eps"],
        state=[o.state[p]["sum"] for o, p in zip(optimizers, parameters, strict=True)],
    )


def count_step(optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[nn.Parameter]) -> int:
    """Advance every parameter's ``step`` by one, and return the first's."""
    steps = [o.state[p]["step"] for o, p in zip(optimizers, parameters, strict=True)]
    torch._foreach_add_(steps, 1)
    return int(steps[0])
