"""Parameters that every rank holds alike, and the exchange of their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from recemb.backends.base import Backend


class Replicas:
    """The replicated parameters of one kernel, whose gradients a backward exchanges all at once.

    The exchange is part of the look-up's graph, so that what arrives at a parameter, where an optimizer may
    be attached that steps at once, is the same on every rank. DistributedDataParallel steps in the backward
    only where there is an accelerator.

    Args:
        backends: the tables, by name.
        keys: the ``<table>.<param>`` that are replicated.
        group: the ranks.
        divisor: of the sum: 1, or the number of ranks for a mean.
    """

    def __init__(
        self,
        backends: Mapping[str, Backend],
        keys: Sequence[str],
        group: dist.ProcessGroup | None,
        divisor: int,
    ) -> None:
        places = [key.split(".") for key in keys]
        self._places = [(backends[name], param) for name, param in places]
        self.group, self.divisor = group, divisor

    def named_parameters(self) -> Iterator[tuple[str, str, Tensor]]:
        """Table, parameter's name, parameter."""
        for backend, param in self._places:
            yield backend.table.name, param, cast(Tensor, backend._parameters[param])

    def parameters(self) -> Iterator[Tensor]:
        for _, _, parameter in self.named_parameters():
            yield parameter

    def broadcast(self) -> None:
        """Take rank 0's weights, on every rank."""
        for parameter in self.parameters():
            dist.broadcast(parameter.data, group=self.group, group_src=0)

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Within, the backends hold views of their parameters whose gradients are exchanged."""
        places = [(b, p) for b, p in self._places if cast(Tensor, b._parameters[p]).requires_grad]
        if not places or not torch.is_grad_enabled():
            yield
            return
        own = [backend._parameters[param] for backend, param in places]
        for (backend, param), view in zip(places, cast(Any, _Exchange).apply(self, *own), strict=True):
            backend._parameters[param] = view
        try:
            yield
        finally:
            for (backend, param), parameter in zip(places, own, strict=True):
                backend._parameters[param] = parameter


class _Exchange(torch.autograd.Function):
    """Views of parameters; the way back sums their gradients over the ranks."""

    @staticmethod
    def forward(ctx: Any, replicas: Replicas, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.replicas = replicas
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        replicas: Replicas = ctx.replicas
        found = list(grads)
        for dtype in dict.fromkeys(grad.dtype for grad in grads):
            members = [k for k, grad in enumerate(grads) if grad.dtype == dtype]
            flat = torch.cat([grads[k].reshape(-1) for k in members])
            dist.all_reduce(flat, group=replicas.group)
            if replicas.divisor > 1:
                flat /= replicas.divisor
            for k, piece in zip(members, torch.split(flat, [grads[k].numel() for k in members]), strict=True):
                found[k] = piece.view_as(grads[k])
        return None, *found
