"""What a look-up in C++ goes through, for a process in which each bad read or write of memory is an error.

Ends with graphs that are alive.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

from recemb.backends.base import Backend
from recemb.bags import Bags
from recemb.engine import Engine
from recemb.errors import BatchError, NonFiniteError
from tests.kernels.cases import METHODS, make_bags, make_engine, settings_of

Model = tuple[Engine, dict[str, Backend], Bags]
KINDS: tuple[type[torch.optim.Optimizer], ...] = (torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adam)


def trained(kind: type[torch.optim.Optimizer] = torch.optim.Adagrad, longest: int = 3) -> Model:
    """Tables of every method, in training: one frozen, one whose first parameter gets its gradient.

    That one has none of torch's hooks: they drop a gradient that another thread may be adding to, and torch
    crashes, without any of ours too.
    """
    engine, tables = make_engine(methods=tuple(METHODS))
    left = next(tables["tt"].parameters())
    stepped = [p for table in tables.values() for p in table.parameters() if p is not left]
    apply_optimizer_in_backward(kind, stepped, {"lr": 0.1})
    tables["md"].requires_grad_(False)
    bags = make_bags(engine, 9, longest, seed=1)
    engine(tables, bags).sum().backward()
    return engine, tables, bags


def refused(call: Callable[[], Any], error: type[Exception] = RuntimeError) -> None:
    try:
        call()
    except error:
        return
    raise AssertionError(f"no {error.__name__}")


def steps(kind: type[torch.optim.Optimizer], longest: int) -> None:
    engine, tables, bags = trained(kind, longest)
    weights = torch.rand(bags.ids.numel(), requires_grad=True)
    for own in (None, weights, weights.detach()):
        bags.weights = own
        loss = engine(tables, bags).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        refused(loss.backward)
        with torch.no_grad():
            engine(tables, bags)
    out = engine(tables, bags)
    refused(lambda: out.backward(torch.full_like(out, torch.nan)), NonFiniteError)
    refused(lambda: out.grad_fn(torch.ones(3)))  # type: ignore[misc] # a node of torch's graph
    bad = Bags(bags.ids + 10**6, bags.offsets, bags.num_features)
    refused(lambda: engine(tables, bad), BatchError)


def derivatives() -> None:
    engine, tables = make_engine(methods=("tt", "qr"))
    bags = make_bags(engine, 9, 3, seed=1)
    own = [parameter for table in tables.values() for parameter in table.parameters()]
    for graph in (False, True):
        loss = engine(tables, bags).square().sum()
        grads = torch.autograd.grad(loss, own, create_graph=graph)
        refused(grads[0].sum().backward)
        if not graph:
            refused(lambda: torch.autograd.grad(loss, own))  # noqa: B023 # called in this iteration


def changes() -> None:
    """What is for Python; another prepared batch is dropped."""
    engine, tables, bags = trained()
    for name in ("tt", "qr"):
        old = engine(tables, bags)
        tables[name] = copy.deepcopy(tables[name])
        engine(tables, bags).sum().backward()
        old.sum().backward()
    for parameter in tables["robe"].parameters():
        settings_of(parameter)["eps"] = 1e-3
    engine(tables, bags).sum().backward()
    for _ in range(2):
        engine.prefetch(tables, bags)
    engine(tables, bags).sum().backward()
    engine.prefetch(tables, bags)


def deletions() -> None:
    """Nodes outlive engines and tables, and end in whatever thread."""
    engine, tables, bags = trained()
    other = Engine([table.table for table in tables.values()])
    outs = [each(tables, bags) for each in (engine, other, other)]
    del engine, other, tables
    gc.collect()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: outs.pop().sum().backward()).result()
        pool.submit(outs.pop).result()
    outs.pop().sum().backward()
    # All of it goes within its own backward.
    held: list[Any] = [*trained()]
    held.append(held[0](*held[1:]))
    held[-1].register_hook(lambda grad: (held.clear(), grad)[1])
    held[-1].sum().backward()


def threads() -> None:
    engine, tables, bags = trained()
    batches = [bags, *(make_bags(engine, size, 3, size) for size in (1, 5, 40))]
    shared = engine(tables, bags).sum()

    def work(k: int) -> None:
        with torch.set_grad_enabled(k % 3 > 0):
            out: Tensor = engine(tables, batches[k % 4])
        if k % 3:
            out.sum().backward()
        with suppress(RuntimeError):  # the last one was its last
            shared.backward(retain_graph=k < 35)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(40)))


class Setting:
    """Whoever compares it may change what it is an entry of."""

    change: Callable[[], Any] = int

    def __eq__(self, other: object) -> bool:
        Setting.change()
        return True

    __hash__ = None  # type: ignore[assignment]


def code_of_others() -> None:
    def entry(parameter: Any, settings: dict[str, Any]) -> None:
        settings["odd"] = Setting()

    def groups(parameter: Any, settings: dict[str, Any]) -> None:
        parameter._in_backward_optimizers[0].param_groups.clear()
        settings.clear()

    def optimizers(parameter: Any, settings: dict[str, Any]) -> None:
        parameter._in_backward_optimizers = []

    def rate(parameter: Any, settings: dict[str, Any]) -> None:
        settings["lr"] = 0.1 + len(settings)

    for change in (entry, groups, optimizers, rate):
        engine, tables, bags = trained()
        first = next(tables["qr"].parameters())
        for noted in (False, True):
            for parameter in tables["qr"].parameters():
                settings_of(parameter)["odd"] = Setting()
            if noted:
                Setting.change = partial(change, first, settings_of(first))
            with suppress(Exception):
                engine(tables, bags).sum().backward()
            Setting.change = int


for made in KINDS:
    for most in (1, 3):
        steps(made, most)
for path in (derivatives, changes, deletions, threads, code_of_others):
    path()
alive = trained()
engine, tables, bags = alive
kept: list[Any] = [engine(tables, bags), engine(tables, bags).sum(), alive]
kept.append(kept)
engine.prefetch(tables, bags)
print("clean")
