"""Adam (Kingma and Ba, arXiv 1412.6980), lazy: only the rows that a batch touches decay and move.

That is ``torch.optim.SparseAdam``'s rule. Dense Adam would also move every other row by its old momentum, at
the cost of the whole table a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recemb.optim.state import counters, in_place
from recemb_kernels.update import Kind, Update

# These move rows that the batch does not touch, or ascend.
NOT_LAZY = ("momentum", "weight_decay", "amsgrad", "maximize")


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


class LazyAdam(torch.optim.Adam):
    """The rule above where no kernel steps: on whole gradients, as of parameters that every rank holds.

    Moves the rows whose gradient has an element other than 0. A kernel also takes those of the batch whose
    gradient happens to be 0 throughout.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # takes no closure
        """Step on every parameter with a gradient, [rows, width]."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                make_state(self, parameter)
                state, grad = self.state[parameter], parameter.grad
                state["step"] += 1
                _step_touched(group, parameter, grad, state)


def is_lazy_adam(kind: type[torch.optim.Optimizer], settings: Mapping[str, Any]) -> bool:
    """Whether an optimizer is Adam without options that move untouched rows, or ascend."""
    return kind is torch.optim.Adam and not any(map(settings.get, NOT_LAZY))


def _step_touched(
    group: Mapping[str, Any], parameter: Tensor, grad: Tensor, state: Mapping[str, Tensor]
) -> None:
    beta1, beta2 = group["betas"]
    mean, square, step = state["exp_avg"], state["exp_avg_sq"], float(state["step"])
    # Without a list of the rows, which a GPU would have to be waited for.
    touched = grad.ne(0).any(dim=1, keepdim=True)
    mean.copy_(torch.where(touched, torch.lerp(mean, grad, 1 - beta1), mean))
    square.copy_(torch.where(touched, square * beta2 + (1 - beta2) * grad * grad, square))
    root = math.sqrt(1 - beta2**step)
    move = mean / (square.sqrt() / root + group["eps"])
    parameter.sub_(torch.where(touched, float(group["lr"]) / (1 - beta1**step) * move, 0.0))


def make_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Give Adam the state that torch would make on its first step, when it has none yet."""
    state, group = optimizer.state[parameter], optimizer.param_groups[0]
    if state:
        return
    on_device = group["capturable"] or group["fused"]
    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
    for name in ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ())):
        state[name] = torch.zeros_like(parameter, requires_grad=False)
