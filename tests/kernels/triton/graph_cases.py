"""A model whose look-ups go through stand-ins of CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Thread
from types import SimpleNamespace
from typing import Any, TypeVar, cast
from unittest.mock import patch

import torch
import torchrec
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

from recemb.backends.base import Backend
from recemb.bags import Bags
from recemb.engine import Engine
from recemb_kernels.digit_tree.group import Batch
from recemb_kernels.triton_frame.captures import exclusive
from recemb_kernels.triton_frame.family import Call
from recemb_kernels.triton_frame.graphs import GraphedGroup
from recemb_kernels.triton_frame.streams import tensors_of
from tests.kernels.cases import make_bags, make_engine
from tests.kernels.triton.harness import by_triton

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, float]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.5}),
    "rowwise_adagrad": (torchrec.optim.RowWiseAdagrad, {"lr": 0.1}),
    "adam": (torch.optim.Adam, {"lr": 0.1}),
}
Tables = dict[str, Backend]
_T = TypeVar("_T")


class FakeRecorder:
    """Counts what it records and replays.

    Args:
        persistent: tensors that a recording must leave as they are.
    """

    def __init__(self, persistent: Callable[[], list[Tensor]]) -> None:
        self._persistent, self.recorded, self.replayed = persistent, 0, 0
        self.num_bytes, self.most_bytes = 0, 1

    def __call__(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.recorded += 1
        held = self._persistent()
        before = [tensor.detach().clone() for tensor in held]
        result = run()
        for tensor, old in zip(held, before, strict=True):
            tensor.detach().copy_(old)
        own = list(tensors_of(_open(result)))
        for tensor in own:
            tensor.fill_(True if tensor.dtype is torch.bool else 7)

        def replay() -> None:
            self.replayed += 1
            for mine, new in zip(own, list(tensors_of(_open(run()))), strict=True):
                mine.copy_(new)

        return result, replay


def _open(result: Any) -> list[Any]:
    """What a recording gives, without what the caller gave: batch and keys."""
    return [
        {name: value for name, value in vars(item).items() if name not in ("batch", "keys")}
        if hasattr(item, "keys") and hasattr(item, "batch")
        else item
        for item in result
    ]


class Model:
    """An engine, its tables, and steps on them."""

    def __init__(self, optimizer: str | None = None, methods: Sequence[str] = ("dense", "md")) -> None:
        self.engine: Engine
        self.tables: Tables
        self.engine, self.tables = make_engine(methods=methods)
        self.parameters = [p for table in self.tables.values() for p in table.parameters()]
        if optimizer is not None:
            kind, settings = OPTIMIZERS[optimizer]
            apply_optimizer_in_backward(kind, self.parameters, dict(settings))

    def persistent(self) -> list[Tensor]:
        states = [
            value
            for p in self.parameters
            for held in getattr(p, "_in_backward_optimizers", [])
            for state in held.state.values()
            for value in state.values()
            if isinstance(value, Tensor) and value.dim()
        ]
        return [*self.parameters, *states]

    def bags(self, seed: int, size: int = 5, weighted: bool = False) -> Bags:
        """Batches of one size have equally many ids."""
        bags = make_bags(self.engine, size, 3, 0)
        generator = torch.Generator().manual_seed(seed)
        limits = [target.num_embeddings for target in self.engine.targets]
        each = bags.offsets[:: bags.batch_size].diff().tolist()
        ids = [torch.randint(0, n, (k,), generator=generator) for n, k in zip(limits, each, strict=True)]
        bags.ids = torch.cat(ids)
        if weighted:
            bags.weights = torch.randn(bags.ids.numel(), generator=generator).requires_grad_()
        return bags

    def look_up(self, bags: Bags) -> Tensor:
        return self.engine(self.tables, bags)


class StubGroup:
    """Launches nothing."""

    def on_device(self) -> AbstractContextManager[None]:
        return nullcontext()

    def plan(self, batch: Batch) -> Call:
        return Call(batch, 1, cast(Any, None))

    def prepare(self, parameters: Any, batch: Batch) -> Call:
        return self.plan(batch)

    def run_beside(self, run: Callable[[], _T]) -> tuple[_T, None]:
        return run(), None

    def plans(self, keep: bool) -> bool:
        return True

    def hold_beside(self) -> None:
        return None

    def remembered(self) -> list[Tensor]:
        return []

    def run_forward(self, parameters: Any, batch: Batch, *, keep: bool, state: Any) -> tuple[Tensor, None]:
        return torch.zeros(batch.size), None

    def forward(self, parameters: Any, batch: Batch, *, keep: bool, state: Any = None) -> tuple[Tensor, None]:
        return torch.zeros(batch.size), None


class StubRecorder:
    """Replays nothing."""

    num_bytes, most_bytes = 0, 1

    def __call__(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        return run(), lambda: None


def at_once(run: Callable[..., Any], *args: Any) -> Any:
    """Stands for a thread pool."""
    made = run(*args)
    return SimpleNamespace(result=lambda: made)


def is_free_elsewhere() -> bool:
    """Whether another thread may capture, or launch a kernel that may be tuned."""
    found: list[bool] = []

    def ask() -> None:
        found.append(exclusive.acquire(blocking=False))
        if found[0]:
            exclusive.release()

    thread = Thread(target=ask)
    thread.start()
    thread.join()
    return found[0]


def gradient(out: Tensor) -> Tensor:
    return torch.sin(torch.arange(out.numel(), dtype=torch.float32, device=out.device)).view(out.shape)


@contextmanager
def graphed(model: Model) -> Iterator[tuple[list[GraphedGroup], FakeRecorder]]:
    recorder = FakeRecorder(model.persistent)
    with by_triton(lambda group: GraphedGroup(group, lambda: recorder)) as groups:
        yield groups, recorder


@contextmanager
def callers_capture() -> Iterator[None]:
    """As if the caller were capturing a CUDA graph."""
    with (
        patch("torch.cuda.is_available", lambda: True),
        patch("torch.cuda.is_current_stream_capturing", lambda: True),
    ):
        yield


def prefetch(model: Model, bags: Bags) -> Any:
    """Prepare a batch; what has been made of it."""
    model.engine.prefetch(model.tables, bags)
    assert bags.ahead is not None
    return bags.ahead.wait()


def steps(model: Model, batches: Sequence[Bags], ahead: int = 0) -> list[Tensor]:
    """Outputs, gradients and weights of steps, their rate changing on the way.

    Args:
        model: what takes them.
        batches: one a step.
        ahead: how many look-ups before its own each is prepared, between forward and backward.
    """
    for bags in batches[1:ahead]:
        prefetch(model, bags)
    found = []
    for k, bags in enumerate(batches):
        for p in model.parameters:
            p.grad = None
            for held in getattr(p, "_in_backward_optimizers", []):
                held.param_groups[0]["lr"] = 0.1 / (1 + k)
        out = model.look_up(bags)
        if ahead and k + ahead < len(batches):
            prefetch(model, batches[k + ahead])
        out.backward(gradient(out))
        found += [out.detach(), *(p.grad for p in model.parameters if p.grad is not None)]
        if bags.weights is not None:
            assert bags.weights.grad is not None
            found.append(bags.weights.grad)
    return [*found, *(p.detach().clone() for p in model.parameters)]


def trained(model: Model, weighted: bool = False) -> list[Tensor]:
    """Six steps, nothing prepared."""
    return steps(model, [model.bags(seed, weighted=weighted) for seed in range(6)])
