"""Adam (Kingma and Ba, arXiv 1412.6980), lazy: only the rows that a batch touches decay and move.

That is ``torch.optim.SparseAdam``'s rule. Dense Adam would also move every other row by its old momentum, at
the cost of the whole table a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recemb.optim.state import counters, in_place
from recemb_kernels.update import Kind, Update


def adam_update(optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[nn.Parameter]) -> Update:
    """``torch.optim.Adam`` without AMSGrad; its state is made on the first step, as in torch."""
    group = optimizers[0].param_groups[0]
    for optimizer, parameter in zip(optimizers, parameters, strict=True):
        make_state(optimizer, parameter)
    states = [o.state[p] for o, p in zip(optimizers, parameters, strict=True)]
    return Update(
        Kind.ADAM,
        lr=float(group["lr"]),
        eps=group["eps"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        state=in_place(states, "exp_avg", parameters),
        state2=in_place(states, "exp_avg_sq", parameters),
        steps=counters(states),
    )


def make_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Give Adam the state that torch would make on its first step, when it has none yet."""
    state, group = optimizer.state[parameter], optimizer.param_groups[0]
    if state:
        return
    on_device = group["capturable"] or group["fused"]
    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
    for name in ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ())):
        state[name] = torch.zeros_like(parameter, requires_grad=False)
