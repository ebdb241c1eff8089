"""One look-up three ways: by Triton kernels, by the CPU's, and in plain torch of any precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recemb_kernels.digit_tree.group import Batch, FeatureCode, Group, TableKernel
from recemb_kernels.triton_frame.family import Family
from recemb_kernels.triton_frame.group import TritonGroup
from recemb_kernels.update import Kind, Update

# Parameters of a table and keys [L] to rows [L, D].
Rows = Callable[[Any, Sequence[Tensor], Tensor], Tensor]
EPSILON = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class Tables:
    """Tables of one op.

    Args:
        family: serves them on GPU.
        kernel: makes their CPU kernels.
        rows: makes their rows in plain torch.
        sizes: per shape, the size of each parameter.
        shapes: one per table.
        features: what is looked up.
    """

    family: type[Family[Any]]
    kernel: Callable[[Any], TableKernel]
    rows: Rows
    sizes: Callable[[Any], Sequence[tuple[int, int]]]
    shapes: Sequence[Any]
    features: Sequence[FeatureCode]

    def triton(self, dtype: torch.dtype = torch.float32) -> TritonGroup:
        pairs = [(self.family, shape) for shape in self.shapes]
        return TritonGroup(pairs, self.features, torch.device("cpu"), [dtype] * len(pairs))

    def cpu(self) -> Group:
        return Group([self.kernel(shape) for shape in self.shapes], self.features)

    def parameters(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.randn(size, generator=generator).to(dtype)
            for shape in self.shapes
            for size in self.sizes(shape)
        ]

    def of_table(self, flat: Sequence[Any], table: int) -> Sequence[Any]:
        """The part of one table in what is flat over the parameters."""
        first = [0]
        for shape in self.shapes:
            first.append(first[-1] + len(self.sizes(shape)))
        return flat[first[table] : first[table + 1]]

    def num_ids(self, feature: FeatureCode) -> int:
        return self.family.num_ids(self.shapes[feature.table], feature.key_base)


def make_batch(
    tables: Tables, batch: int, longest: int, *, weighted: bool = False, seed: int = 0, most: int = 2**62
) -> Batch:
    """Bags of 0 to ``longest`` ids below the feature's number and ``most``; hot ids repeat."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (len(tables.features) * batch,), generator=generator)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    ids = [
        (torch.rand(int(n.sum()), generator=generator) ** 2 * min(most, tables.num_ids(feature))).long()
        for feature, n in zip(tables.features, lengths.view(-1, batch), strict=True)
    ]
    flat = torch.cat(ids)
    # Both signs: a mean is no weighted average.
    weights = torch.randn(flat.numel(), generator=generator) if weighted else None
    return Batch(flat, offsets, weights, batch)


def plain(tables: Tables, parameters: Sequence[Tensor], batch: Batch, weights: Tensor | None) -> Tensor:
    """[B, columns], differentiable, in the dtype of the parameters; skipped ids still count in a mean."""
    found = []
    for f, feature in enumerate(tables.features):
        offsets = batch.offsets[f * batch.size : (f + 1) * batch.size + 1]
        place = slice(int(offsets[0]), int(offsets[-1]))
        ids, lengths = batch.ids[place], offsets.diff()
        stored = (ids >= 0) & (ids < tables.num_ids(feature))
        own = tables.of_table(parameters, feature.table)
        rows = tables.rows(tables.shapes[feature.table], own, ids[stored] + feature.key_base)
        if weights is not None:
            rows = rows * weights[place][stored, None].to(rows.dtype)
        bag = torch.repeat_interleave(torch.arange(batch.size), lengths)[stored]
        pooled = rows.new_zeros(batch.size, rows.shape[1]).index_add(0, bag, rows)
        found.append(pooled / lengths.clamp(min=1)[:, None] if feature.mean else pooled)
    return torch.cat(found, 1)


def plain_all(
    tables: Tables, parameters: Sequence[Tensor], batch: Batch, grad: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """The output, and the gradients of every parameter and of the weights."""
    leaves = [p.detach().to(dtype).requires_grad_() for p in parameters]
    weights = None if batch.weights is None else batch.weights.to(dtype).requires_grad_()
    out = plain(tables, leaves, batch, weights)
    inputs = [*leaves, *(() if weights is None else (weights,))]
    grads = torch.autograd.grad(out, inputs, grad.to(dtype), allow_unused=True)
    return [
        out.detach(),
        *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)),
    ]


def run(
    group: TritonGroup | Group,
    parameters: Sequence[Tensor],
    batch: Batch,
    grad: Tensor,
    updates: Sequence[Update | None] | None = None,
) -> list[Tensor]:
    """The same by kernels; without what has no gradient because it was updated."""
    free = [None] * group.num_tables if updates is None else updates
    each: Any = group
    out, state = each.forward(parameters, batch, keep=True)
    grads, weights = each.backward(
        grad,
        parameters,
        batch,
        state,
        updates=free,
        wanted=[True] * len(parameters),
        want_weights=batch.weights is not None,
    )
    return [out, *(g for g in (*grads, weights) if g is not None)]


def assert_law(
    found: Sequence[Tensor], exact: Sequence[Tensor], peers: Sequence[Tensor], epsilon: float
) -> None:
    """At most twice the error of plain torch in the same dtype, and a unit in the last place."""
    assert len(found) == len(exact) == len(peers)
    for k, (x, reference, peer) in enumerate(zip(found, exact, peers, strict=True)):
        assert x.shape == reference.shape
        if not x.numel():
            continue
        error = (x.double() - reference).abs().max()
        allowed = 2 * (peer.double() - reference).abs().max() + epsilon * reference.abs().max()
        assert error <= allowed, (k, float(error), float(allowed))


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what is allocated without being set: NaN for numbers, 1 for row numbers and marks."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def filled(*args: Any, make: Callable[..., Tensor] = make, **options: Any) -> Tensor:
            fresh = make(*args, **options)
            return fresh.fill_(float("nan") if fresh.is_floating_point() else 1)

        monkeypatch.setattr(torch, name, filled)


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for the device: numbers read out, shapes that depend on data."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func)
        masks = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.dtype == torch.bool]
        waits = any(word in name for word in ("_local_scalar_dense", "nonzero", "unique", "masked_select"))
        if waits or (name.startswith(("aten.index.", "aten.index_put")) and masks):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def make_updates(
    tables: Tables, parameters: Sequence[Tensor], kinds: Sequence[Kind | None]
) -> list[Update | None]:
    """One update a table, with states as after some steps; equal arguments give equal updates."""
    generator = torch.Generator().manual_seed(3)
    updates: list[Update | None] = []
    for t, kind in enumerate(kinds):
        if kind is None:
            updates.append(None)
            continue
        own = tables.of_table(parameters, t)
        states = {
            Kind.SGD: [],
            Kind.ROWWISE_ADAGRAD: [torch.rand(len(p), 1, generator=generator) for p in own],
        }.get(kind, [torch.rand(p.shape, generator=generator) for p in own])
        second = [torch.rand(p.shape, generator=generator) for p in own] if kind == Kind.ADAM else []
        steps = [] if kind == Kind.SGD else [torch.tensor(4.0) for _ in own]
        updates.append(
            Update(
                kind,
                lr=0.1,
                eps=1e-3,
                beta1=0.9,
                beta2=0.99,
                lr_decay=0.1,
                state=states,
                state2=second,
                steps=steps,
            )
        )
    return updates


def copied(update: Update | None) -> Update | None:
    """The same update with states of its own."""
    if update is None:
        return None
    state, state2, steps = ([x.clone() for x in each] for each in (update.state, update.state2, update.steps))
    return replace(update, state=state, state2=state2, steps=steps)


def upstream(tables: Tables, batch: Batch) -> Tensor:
    """A gradient of the output."""
    columns = sum(tables.family.dim(tables.shapes[f.table]) for f in tables.features)
    return torch.randn(batch.size, columns, generator=torch.Generator().manual_seed(5))


def assert_near(tables: Tables, batch: Batch, dtype: torch.dtype = torch.float32) -> None:
    """Outputs and all gradients keep the error law."""
    parameters, grad = tables.parameters(dtype), upstream(tables, batch)
    found = run(tables.triton(dtype), parameters, batch, grad)
    exact, peers = (plain_all(tables, parameters, batch, grad, kind) for kind in (torch.float64, dtype))
    assert [x.dtype for x in found[1 : 1 + len(parameters)]] == [dtype] * len(parameters)
    assert_law(found, exact, peers, EPSILON[dtype])


def assert_same_steps(tables: Tables, batch: Batch, kinds: Sequence[Kind | None]) -> None:
    """Parameters, states and gradients after a backward by Triton are those after the CPU's."""
    theirs = tables.parameters()
    before, ours = [p.clone() for p in theirs], [p.clone() for p in theirs]
    updates = make_updates(tables, theirs, kinds)
    mine = [copied(update) for update in updates]
    grad = upstream(tables, batch)
    expected = run(tables.cpu(), theirs, batch, grad, updates)
    found = run(tables.triton(), ours, batch, grad, mine)
    for x, y in zip([*found, *ours], [*expected, *theirs], strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6)
    for own, other in zip(mine, updates, strict=True):
        for name in ("state", "state2", "steps"):
            for x, y in zip(getattr(own, name, ()), getattr(other, name, ()), strict=True):
                torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6)
    for old, x, y in zip(before, ours, theirs, strict=True):
        assert torch.equal((x == old).all(1), (y == old).all(1))
