"""Fused updates: optimizers attached by ``apply_optimizer_in_backward``, applied inside the backward kernel.

torch's idiom stays as it is::

    from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
    apply_optimizer_in_backward(torchrec.optim.RowWiseAdagrad, ebc.parameters(), {"lr": 0.01})

Where a kernel can do the step itself, the gradient is never materialised and torch's hook never fires; the
optimizer object keeps its state, its ``param_groups`` (learning-rate schedules act on them) and its state
dict. Everywhere else the gradient is accumulated and the hook steps, as in plain torch, but that Adam stays
lazy there. Without a hook (``register_hook=False``, or removed, as DistributedDataParallel does) nothing
steps in the backward, and the gradient is there for whoever does.

That is settled in the look-up. Where a hook is removed between it and its backward, this backward steps
still, and the next look-up's does not; torch would leave this gradient already. To ask every hook once more
would cost a step of many tables microseconds, and the gradient would have to be added past autograd, unseen
by hooks on it such as DistributedDataParallel's: the parameter was no input of this backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from recemb.errors import ConfigError
from recemb.optim.adagrad import adagrad_update
from recemb.optim.adam import NOT_LAZY, adam_update, kind_of
from recemb.optim.attached import stepping
from recemb.optim.rowwise_adagrad import is_rowwise_adagrad, rowwise_adagrad_update
from recemb.optim.sgd import sgd_update
from recemb.optim.state import settings_of, version_of
from recemb_kernels.update import Step, Update

_Rule = Callable[[Sequence[torch.optim.Optimizer], Sequence[nn.Parameter]], Update]


class FusedUpdate:
    """What update one storage's in-backward optimizers ask for; remembered, as Python's steps ask anew."""

    def __init__(self) -> None:
        # In one piece, as threads may ask side by side.
        self._seen: tuple[list[nn.Parameter], list[object], list[object], Step | None] = ([], [], [], None)
        self._made: tuple[object, Update, list[dict[str, Any]], list[object]] | None = None

    def of(self, parameters: Sequence[nn.Parameter]) -> Step | None:
        """What makes the update, in a backward, with the learning rate of that moment.

        In C++ it is asked once more where a setting or a state is another object than at the last one.

        Args:
            parameters: those of the storage, which are updated together.

        Returns:
            a step that leaves frozen parameters, and the gradients of those without an optimizer that steps
            in the backward, or with several; ``None`` when there is none, when they differ in class or
            settings, or when one has an option (momentum, weight decay, ...) that touches more than the rows
            of the batch.
        """
        each = [stepping(parameter) if parameter.requires_grad else [] for parameter in parameters]
        optimizers: list[Any] = [found[0] if len(found) == 1 else None for found in each]
        settings = [optimizer.param_groups[0] for optimizer in optimizers if optimizer is not None]
        # What is left out may be another tensor each step: a view through which gradients are exchanged.
        own = [p for p, optimizer in zip(parameters, optimizers, strict=True) if optimizer is not None]
        # Rates that are tensors, one for each optimizer, may have been equal and be so no more.
        written = [version_of(v) for group in settings for v in group.values() if isinstance(v, Tensor)]
        known, same, unchanged, step = self._seen
        self._made = None  # asked again, as something has changed: the states have to be looked at once more
        if not (
            len(known) == len(own)
            and all(map(is_, known, own))
            and optimizers == same
            and [settings, written] == unchanged
        ):
            attached = [optimizer for optimizer in optimizers if optimizer is not None]
            rule = _resolve(attached)
            left = frozenset(k for k, optimizer in enumerate(optimizers) if optimizer is None)
            sources = tuple(zip(attached, own, strict=True))
            make = None if rule is None else partial(self._make, rule, attached, own, left)
            step = None if make is None else Step(make, left, sources)
            self._seen = own, optimizers, [[settings_of(group) for group in settings], written], step
        return step

    def _make(
        self,
        rule: _Rule,
        optimizers: Sequence[torch.optim.Optimizer],
        parameters: Sequence[nn.Parameter],
        left: frozenset[int],
    ) -> Update:
        # Of these very optimizers: settings of others hold other parameters, which do not compare.
        made = self._made  # another thread's look-up may forget it meanwhile
        if made is not None and made[0] is optimizers:
            _, update, unchanged, held = made
            settings, state = _what_a_step_reads(optimizers, parameters)
            if settings == unchanged and len(state) == len(held) and all(map(is_, state, held)):
                return update
        _check_alike(optimizers)
        update = _spread(rule(optimizers, parameters), left)
        settings, state = _what_a_step_reads(optimizers, parameters)
        self._made = optimizers, update, [settings_of(group) for group in settings], state
        if any(isinstance(value, Tensor) for group in settings for value in group.values()):
            self._made = None  # A rate that is a tensor changes in place, as schedules do it.
        return update


def _check_alike(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """That settings which were equal at the look-up still are.

    Raises:
        ConfigError: they are not.
    """
    groups = [optimizer.param_groups[0] for optimizer in optimizers]
    each = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    # To compare tensors may be to wait for a GPU.
    tensors = any(isinstance(value, Tensor) for settings in each for value in settings.values())
    if not tensors and any(settings != each[0] for settings in each):
        raise ConfigError(
            f"a table's parameters step together: settings were equal at the look-up and are {each} in its "
            "backward. No weight has changed; give them equal ones, or change them between steps"
        )


def _what_a_step_reads(
    optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[nn.Parameter]
) -> tuple[list[dict[str, Any]], list[object]]:
    settings: list[dict[str, Any]] = []
    state: list[object] = []
    for optimizer, parameter in zip(optimizers, parameters, strict=True):
        settings.append(optimizer.param_groups[0])
        state += optimizer.state[parameter].values()
    return settings, state


def _spread(update: Update, left: frozenset[int]) -> Update:
    """An update of the stepped parameters as one of all parameters."""
    if not left:
        return update

    def all_of(states: Sequence[Tensor | None]) -> list[Tensor | None]:
        given = iter(states)
        return [None if k in left else next(given) for k in range(len(states) + len(left))] if states else []

    state, state2, steps = map(all_of, (update.state, update.state2, update.steps))
    return replace(update, state=state, state2=state2, steps=steps, left=left)


def _resolve(attached: Sequence[torch.optim.Optimizer]) -> _Rule | None:
    if not attached:
        return None
    if any(len(optimizer.param_groups) != 1 for optimizer in attached):
        return None
    first = _settings(attached[0])
    if any(_settings(other) != first for other in attached) or any(map(first[1].get, NOT_LAZY)):
        return None
    return _rule(attached[0])


def _settings(optimizer: torch.optim.Optimizer) -> tuple[type, dict[str, Any]]:
    (group,) = optimizer.param_groups
    return kind_of(optimizer), {key: value for key, value in group.items() if key != "params"}


def _rule(optimizer: torch.optim.Optimizer) -> _Rule | None:
    if type(optimizer) is torch.optim.SGD:
        return sgd_update
    if type(optimizer) is torch.optim.Adagrad:
        return adagrad_update
    if kind_of(optimizer) is torch.optim.Adam:
        return adam_update
    return rowwise_adagrad_update if is_rowwise_adagrad(optimizer) else None
