"""Adagrad (Duchi et al., 2011), element-wise: s += g**2, w -= lr * g / (sqrt(s) + eps)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from recemb.optim.state import counters, in_place
from recemb_kernels.update import Kind, Update


def adagrad_update(optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[nn.Parameter]) -> Update:
    """``torch.optim.Adagrad``; rows without a gradient would not change under it either."""
    return sum_update(Kind.ADAGRAD, optimizers, parameters)


def sum_update(
    kind: Kind, optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[nn.Parameter]
) -> Update:
    """The update of an optimizer whose state is ``step`` and ``sum``."""
    group = optimizers[0].param_groups[0]
    states = [o.state[p] for o, p in zip(optimizers, parameters, strict=True)]
    return Update(
        kind,
        lr=float(group["lr"]),
        eps=group["eps"],
        lr_decay=group["lr_decay"],
        state=in_place(states, "sum", parameters, row_wise=kind == Kind.ROWWISE_ADAGRAD),
        steps=counters(states),
    )
