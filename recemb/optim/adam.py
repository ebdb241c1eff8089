"""Adam (Kingma and Ba, arXiv 1412.6980), lazy: only the rows that a batch touches decay and move.

That is ``torch.optim.SparseAdam``'s rule. Dense Adam would also move every other row by its old momentum, at
the cost of the whole table a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from recemb.optim.state import in_place
from recemb_kernels.update import Kind, Update


def adam_update(optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[nn.Parameter]) -> Update:
    """``torch.optim.Adam`` without AMSGrad; its state is made on the first step, as in torch."""
    group = optimizers[0].param_groups[0]
    states = [o.state[p] for o, p in zip(optimizers, parameters, strict=True)]
    for state, parameter in zip(states, parameters, strict=True):
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
    return Update(
        Kind.ADAM,
        lr=float(group["lr"]),
        eps=group["eps"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        state=in_place([state["exp_avg"] for state in states]),
        state2=in_place([state["exp_avg_sq"] for state in states]),
        steps=in_place([state["step"] for state in states]),
    )
