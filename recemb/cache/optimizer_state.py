"""The optimizer state of a cached row that another row replaces."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recemb.optim.attached import attached_to


@torch.no_grad()
def reset_rows(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, rows: Tensor) -> None:
    """Give some rows of a parameter the optimizer state of a row that has never been stepped.

    Args:
        optimizer: one that steps ``parameter``; state that it has not made yet is left out.
        parameter: [C, D].
        rows: [P] int64.
    """
    state = optimizer.state.get(parameter, {})
    groups = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    for name, value in state.items():
        # Step counters are of the whole parameter, and stay.
        if isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] == parameter.shape[0]:
            # These alone start elsewhere than at 0: Adagrad's sum and Rprop's steps.
            setting = {"sum": "initial_accumulator_value", "step_size": "lr"}.get(name)
            start = groups[0].get(setting, 0) if setting and groups else 0
            value.index_fill_(0, rows.to(value.device), float(start))


def reset_in_backward(parameter: nn.Parameter, rows: Tensor) -> None:
    """:func:`reset_rows` for the optimizers attached by ``apply_optimizer_in_backward``."""
    for optimizer in attached_to(parameter):
        reset_rows(optimizer, parameter, rows)
