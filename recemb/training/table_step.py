"""The tables' half of a training step, held back until every gradient is known to be finite.

The tables' optimizer steps inside their backward, where it is too late to look at the gradients of the dense
layers. So the graph is cut at the pooled embeddings [B, sum of D]::

    loss.backward()          dense layers have gradients, the pooled embeddings have theirs, no weight moved
    check                    of all of these, and of the tables that plain torch steps
    tables.backward()        from the pooled embeddings into the tables: kernels and hooks step
    optimizer.step()         the dense layers

What stays unchecked is the arithmetic inside a kernel: a product of finite numbers there may still overflow.
In a sharded collection the tables that plain torch steps are among what stays unchecked: their gradients are
known on the ranks that have the tables, once the exchange in the backward is under way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.optim.apply_optimizer_in_backward import _get_in_backward_optimizers
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.distributed.types import Awaitable
from torchrec.sparse.jagged_tensor import KeyedTensor

from recemb.cache.metrics import CacheMetrics
from recemb.torchrec_io.embedding_bag_collection import EmbeddingBagCollection
from recemb.torchrec_io.sharding.module import ShardedEmbeddingBagCollection


def find_collection(model: nn.Module) -> tuple[str, EmbeddingBagCollection]:
    """The path of the one collection of compressed tables in ``model``, and the collection."""
    ((path, collection),) = [
        (path, module) for path, module in model.named_modules() if isinstance(module, EmbeddingBagCollection)
    ]
    return path, collection


def table_step(model: nn.Module) -> tuple[str, TableStep]:
    """The path of the one collection in ``model``, sharded or not, and its half of a training step."""
    whole = get_unwrapped_module(model)
    for path, module in whole.named_modules():
        if isinstance(module, ShardedEmbeddingBagCollection):
            return path, ShardedTableStep(module)
    path, collection = find_collection(model)
    return path, TableStep(collection)


@dataclass(frozen=True)
class _Cut:
    """One forward of the collection: what it gave, [B, sum of D], and the leaf that took its place."""

    output: Tensor
    leaf: KeyedTensor

    @property
    def gradient(self) -> Tensor:
        gradient: Tensor = self.leaf.values().grad
        return gradient


class TableStep:
    """Cuts the graph at one collection's output, and takes the collection's backward when told to.

    Args:
        collection: called once a step; each of its parameters has an optimizer attached by
            ``apply_optimizer_in_backward``.
    """

    def __init__(self, collection: nn.Module) -> None:
        self._collection = collection
        self._names, self._parameters = zip(*collection.named_parameters(), strict=True)
        self._last: _Cut | None = None
        self._gradients: tuple[Tensor | None, ...] = ()

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Run the model's forward inside: the collection's output is then a leaf of the graph above it."""
        self._last = None
        handle = self._collection.register_forward_hook(self._replace)
        try:
            yield
        finally:
            handle.remove()

    @property
    def pooled(self) -> KeyedTensor:
        """The leaf, [B, sum of D]; its values have a gradient once the loss has gone backward."""
        assert self._last is not None
        return self._last.leaf

    def cache_metrics(self) -> dict[str, CacheMetrics]:
        """What the cached tables on this rank have done so far, by name."""
        assert isinstance(self._collection, EmbeddingBagCollection | ShardedEmbeddingBagCollection)
        return self._collection.cache_metrics()

    def gradients(self) -> list[tuple[str, Tensor]]:
        """Name and gradient of each parameter that no kernel steps; nothing is stepped by this.

        Without a compiler, on CUDA and in float64 these are all of them, else a few small ones or none.
        """
        assert self._last is not None
        # Kernels that step cut their parameters off the graph, and a node that leads to none of the inputs
        # does not run; hooks fire on accumulation only. So this has no side effect.
        self._gradients = torch.autograd.grad(
            self._last.output,
            self._parameters,
            self._last.gradient,
            retain_graph=True,
            allow_unused=True,
        )
        pairs = zip(self._names, self._gradients, strict=True)
        return [(name, gradient) for name, gradient in pairs if gradient is not None]

    def backward(self) -> None:
        """Step the tables. Call :meth:`gradients` first, and look at what it returns."""
        assert self._last is not None
        if all(gradient is not None for gradient in self._gradients):
            # No kernel steps, so these gradients are all that a second pass would find.
            for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                parameter.grad = gradient
            for optimizer in _get_in_backward_optimizers(self._collection):
                optimizer.step()
                optimizer.zero_grad()
        else:
            self._last.output.backward(self._last.gradient)  # type: ignore[no-untyped-call] # torch's
        self._last, self._gradients = None, ()

    def _replace(self, module: nn.Module, args: tuple[object, ...], output: KeyedTensor) -> KeyedTensor:
        assert self._last is None, "one call of the collection a step"
        values = output.values()
        leaf = KeyedTensor(
            keys=output.keys(),
            length_per_key=output.length_per_key(),
            values=values.detach().requires_grad_(),
        )
        self._last = _Cut(values, leaf)
        return leaf


class ShardedTableStep(TableStep):
    """The same of a sharded collection, whose output and backward are exchanges between the ranks.

    Whether every rank's gradients are finite is for the ranks to agree on between :meth:`gradients` and
    :meth:`backward`: one that raised alone would leave the others waiting.
    """

    def gradients(self) -> list[tuple[str, Tensor]]:
        """None: to find them would be the backward, exchange and steps included."""
        return []

    def backward(self) -> None:
        """Step the tables, on every rank."""
        assert self._last is not None
        self._last.output.backward(self._last.gradient)  # type: ignore[no-untyped-call] # torch's
        self._last = None

    def _replace(
        self, module: nn.Module, args: tuple[object, ...], output: Awaitable[KeyedTensor]
    ) -> KeyedTensor:
        return super()._replace(module, args, output.wait())
