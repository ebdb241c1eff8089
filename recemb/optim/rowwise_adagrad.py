"""Row-wise Adagrad, torchrec's default: s += mean(g**2) once a row, w -= lr * g / (sqrt(s) + eps)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from recemb.optim.adagrad import sum_update
from recemb_kernels.update import Kind, Update


def is_rowwise_adagrad(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this is ``torchrec.optim.RowWiseAdagrad``, told by name: this room imports no torchrec."""
    kind = type(optimizer)
    return kind.__name__ == "RowWiseAdagrad" and kind.__module__.startswith("torchrec.")


def rowwise_adagrad_update(
    optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[nn.Parameter]
) -> Update:
    """``torchrec.optim.RowWiseAdagrad``; a row is a row of the stored 2-D parameter (a TT core's slice)."""
    return sum_update(Kind.ROWWISE_ADAGRAD, optimizers, parameters)
