"""Adam (Kingma and Ba, arXiv 1412.6980), lazy: only the rows that a batch touches decay and move.

That is ``torch.optim.SparseAdam``'s rule. Dense Adam would also move every other row by its old momentum, at
the cost of the whole table a step.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import wraps
from typing import Any
from weakref import ref

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

    It keeps what an Adam keeps, so that one can become the other (:func:`step_lazily`).

    Moves the rows whose gradient has an element other than 0. A kernel also takes those of the batch whose
    gradient is 0 throughout, as with sample weights of 0: they decay there, and stay here. With options that
    move every row, or ascend, it is ``torch.optim.Adam``, as the fused step then leaves the step to torch.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step on every parameter with a gradient, [rows, width]; ``closure`` as torch's."""
        if any(group.get(name) for group in self.param_groups for name in NOT_LAZY):
            # Without torch's wrapper, whose hooks have been run around this one.
            return inspect.unwrap(torch.optim.Adam.step)(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    make_state(self, parameter)
                    _step_touched(group, parameter, parameter.grad, self.state[parameter])
        return loss


def kind_of(optimizer: torch.optim.Optimizer) -> type[torch.optim.Optimizer]:
    """Its class as the user has named it: a :class:`LazyAdam` is an Adam."""
    return torch.optim.Adam if type(optimizer) is LazyAdam else type(optimizer)


def step_lazily(optimizer: torch.optim.Optimizer) -> None:
    """Make a ``torch.optim.Adam`` a :class:`LazyAdam`, with its state and settings; others stay."""
    if type(optimizer) is not torch.optim.Adam:
        return
    scheduled = vars(optimizer).pop("step", None)
    optimizer.__class__ = LazyAdam
    optimizer._patch_step_function()  # torch's __init__ has it run the hooks of a step
    if scheduled is None:
        return
    # A learning-rate scheduler has put a step of Adam's before the class's own, to see when it is called.
    own = ref(optimizer)

    @wraps(scheduled)
    def step(*arguments: Any, **named: Any) -> Any:
        found: Any = own()
        found._opt_called = True
        return type(found).step(found, *arguments, **named)

    optimizer.step = step  # type: ignore[method-assign]


def _step_touched(
    group: Mapping[str, Any], parameter: Tensor, grad: Tensor, state: Mapping[str, Tensor]
) -> None:
    beta1, beta2 = group["betas"]
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    state["step"] += 1
    # In double: 1 - beta2**step has few digits in a float. Where the counter is: nobody waits for a GPU.
    step = state["step"].double()
    root, rate = (1 - beta2**step).sqrt(), group["lr"] / (1 - beta1**step)
    touched = grad.ne(0).any(dim=1, keepdim=True)
    one = touched.to(grad.dtype)
    mean.lerp_(grad, one * (1 - beta1))
    square.mul_(1 - one * (1 - beta2)).addcmul_(grad, grad, value=1 - beta2)
    move = square.sqrt().div_(root).add_(group["eps"])
    # Not times 0: with eps = 0 rows that were never touched have 0 / 0 here.
    parameter.sub_(torch.where(touched, torch.div(mean, move, out=move).mul_(rate), 0.0))


def make_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Give Adam the state that torch would make on its first step, when it has none yet."""
    state, group = optimizer.state[parameter], optimizer.param_groups[0]
    if state:
        return
    on_device = group["capturable"] or group["fused"]
    # Wherever it is asked for: training goes on with these tensors.
    with torch.inference_mode(False):
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
        for name in ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ())):
            state[name] = torch.zeros_like(parameter, requires_grad=False)
