"""Stochastic gradient descent: w -= lr * g."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from recemb_kernels.update import Kind, Update


def sgd_update(optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[nn.Parameter]) -> Update:
    """``torch.optim.SGD`` without momentum."""
    group = optimizers[0].param_groups[0]
    return Update(Kind.SGD, lr=float(group["lr"]))
