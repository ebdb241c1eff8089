"""One rank of the cached tables' tests; leaves what each case found in a file of JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec import KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist
from torchrec.optim.optimizers import in_backward_optimizer_filter

from recemb.cache.loading import MARKS
from recemb.cache.optimizer_state import reset_rows
from recemb.errors import ConfigError
from recemb.training.distributed import Launch, World
from recemb.training.sharded import whole_weights
from tests.sharding.cached_cases import (
    CACHED,
    CASES,
    STEPS,
    CachedCase,
    Model,
    attach,
    batch,
    collection,
    sharded,
)
from tests.sharding.cases import BATCH, KEYS, joined, variable_batch
from tests.sharding.saved import FORMATS, load, save
from tests.sharding.shared import Found, held, join, local_state, run_all
from tests.sharding.worker import through


def stepper(model: nn.Module) -> torch.optim.Optimizer:
    """Adagrad for what no backward steps; a row that enters a cache starts with the sum of a fresh one."""
    parameters = dict(in_backward_optimizer_filter(model.named_parameters()))
    ebc = model.ebc if isinstance(model, Model) else model.module.ebc
    # Replicated uncompressed tables, which torchrec leaves out of the backward, are not looked at here.
    own = [value for key, value in parameters.items() if "d_dp" not in key]
    optimizer = torch.optim.Adagrad(own or [nn.Parameter(torch.zeros(1))], lr=0.05)
    for cache in ebc.hot_row_caches().values():
        cache.on_replace.append(lambda cache, slots: reset_rows(optimizer, cache.weight, slots))
    return optimizer


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, features: Any, *, accumulate: bool = False
) -> dict[str, Tensor]:
    """Forward and backward; the optimizer steps unless gradients are to be accumulated."""
    loss, columns = model(features)
    loss.backward()
    if not accumulate:
        optimizer.step()
        optimizer.zero_grad()
    return columns


def parity(rank: int, case: CachedCase, frozen: tuple[str, ...] = (), accumulate: int = 1) -> Found:
    """Steps beside the unsharded model on the ranks' batches together.

    Args:
        frozen: tables that take no gradient.
        accumulate: batches of one step of the optimizer.
    """
    reference = Model(collection(case))
    for name in frozen:
        reference.ebc.embedding_bags[name].requires_grad_(False)
    attach(case, [parameter for parameter in reference.ebc.parameters() if parameter.requires_grad])
    model = sharded(case, reference.state_dict(), frozen)
    plain, own = stepper(reference), stepper(model)
    outputs: dict[str, float] = {}
    for at in range(STEPS):
        # Feature f2 has no ids on rank 0, and f6 none anywhere in the second step.
        local = [
            batch(10 * at + who, case, "f6" if at == 1 else "f2" if who == 0 else None) for who in (0, 1)
        ]
        more = (at + 1) % accumulate > 0
        expected = step(reference, plain, joined(local), accumulate=more)
        for name, columns in step(model, own, local[rank], accumulate=more).items():
            difference = float((columns - expected[name][rank * BATCH :][:BATCH]).detach().abs().max())
            outputs[name] = max(difference, outputs.get(name, 0.0))
    after = reference.state_dict()
    state = model.state_dict()
    return {
        "outputs": outputs,
        "weights": {key: _difference(value, after[key]) for key, value in state.items()},
        "keys": sorted(state) == sorted(after),
        "state": _state_differences(model, reference) if case.optimizer else {},
        "asks": sorted(key for key, value in model.named_parameters() if value.requires_grad),
        "fused": sorted(model.fused_optimizer.params),
        "metrics": {name: asdict(found) for name, found in model.module.ebc.cache_metrics().items()},
        "expected": {name: asdict(found) for name, found in reference.ebc.cache_metrics().items()},
    }


def _state_differences(model: nn.Module, reference: Model) -> dict[str, float | None]:
    """Of the optimizer state of cached tables."""
    whole = reference.ebc.fused_optimizer.state_dict()["state"]
    return {
        f"{key}.{name}": _difference(value, whole[key.removeprefix("ebc.")][name])
        for key, own in of_cached(model.fused_optimizer.state_dict()["state"]).items()
        for name, value in own.items()
    }


def of_cached(state: dict[str, Any]) -> dict[str, Any]:
    """The entries of cached tables in a state dict."""
    return {key: value for key, value in state.items() if key.split(".")[2] in CACHED}


def _difference(value: Any, whole: Tensor) -> float | None:
    """Largest difference of what this rank holds; ``None`` where that is nothing."""
    parts = held(value)
    found = [float((part - whole[at]).abs().max()) for at, part in parts if part.numel()]
    return max(found) if found else None


def resharded(rank: int, kind: str, folder: Path) -> Found:
    """What one process saved goes on on two ranks, then under another plan on two, to be loaded by one again.

    Into tensors in place, of models that have caches of their own by then.
    """
    found: Found = {}
    path = folder.parent / f"{kind}1"
    for place, steps in (("both", range(5, 7)), ("swapped", range(7, 9))):
        case = CachedCase("importance", "sum", "adagrad", place)
        model = sharded(case, {})
        optimizer = stepper(model)
        for at in range(3):
            step(model, optimizer, batch(100 + 10 * at + rank, case))
        state = {
            "model": of_cached(model.state_dict()),
            "optimizer": of_cached(model.fused_optimizer.state_dict()["state"]),
        }
        load(kind, path, state)
        expected = torch.load(folder.parent / f"reference{steps.start}.pt", weights_only=True)
        found[f"{place} loaded"] = {
            key: _difference(value, expected["model"][key]) for key, value in state["model"].items()
        } | {
            f"{key}.{name}": _difference(value, expected["optimizer"][key][name])
            for key, own in state["optimizer"].items()
            for name, value in own.items()
        }
        for at in steps:
            step(model, optimizer, batch(10 * at + rank, case))
        expected = torch.load(folder.parent / f"reference{steps.stop}.pt", weights_only=True)
        found[f"{place} trained"] = {
            key: _difference(value, expected["model"][key])
            for key, value in of_cached(model.state_dict()).items()
        }
        path = folder.parent / f"{kind}{place}"
        save(
            kind,
            path,
            {"model": model.state_dict(), "optimizer": model.fused_optimizer.state_dict()["state"]},
        )
    return found


def looking_up(rank: int) -> Found:
    """Evaluation, and look-ups without gradients, count and exchange nothing."""
    case = CachedCase("lfu", "sum", "sgd")
    model = sharded(case, Model(collection(case)).state_dict())
    optimizer = stepper(model)
    for at in range(4):
        step(model, optimizer, batch(10 * at + rank, case))
    before = {key: value.clone() for key, value in local_state(model).items()}
    model.eval()
    for _ in range(3):
        model(batch(rank, case))
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(batch(rank, case))
    return {"kept": {key: torch.equal(value, before[key]) for key, value in local_state(model).items()}}


def joined_variable() -> KeyedJaggedTensor:
    """Both ranks' batches of sizes of their own as one."""
    batches = [variable_batch(who) for who in (0, 1)]
    parts = [[features[key] for features in batches] for key in KEYS]
    sizes = [[part.lengths().numel() for part in both] for both in parts]
    first, second = (features.inverse_indices()[1] for features in batches)
    shift = torch.tensor([own for own, _ in sizes])[:, None]
    return KeyedJaggedTensor(
        KEYS,
        torch.cat([part.values() for both in parts for part in both]),
        lengths=torch.cat([part.lengths() for both in parts for part in both]),
        stride_per_key_per_rank=[[sum(both)] for both in sizes],
        inverse_indices=(KEYS, torch.cat([first, second + shift], dim=1)),
    )


def variable(rank: int) -> Found:
    """A batch size per feature, over two exchanges of rows."""
    case = CachedCase("importance", "sum", "sgd", "variable")
    reference = Model(collection(case))
    attach(case, list(reference.ebc.parameters()))
    model = sharded(case, reference.state_dict())
    outputs: dict[str, float] = {}
    for _ in range(5):
        loss, expected = reference(joined_variable())
        loss.backward()
        loss, columns = model(variable_batch(rank))
        loss.backward()
        for name, part in columns.items():
            difference = float((part - expected[name][rank * BATCH :][:BATCH]).detach().abs().max())
            outputs[name] = max(difference, outputs.get(name, 0.0))
    caches = model.module.ebc.cache_metrics()
    return {"outputs": outputs, "filled": {name: found.cached_rows for name, found in caches.items()}}


def another_cache(rank: int) -> Found:
    """A state with a cache of another size, or policy, is refused on every rank before anything is loaded."""
    case = CachedCase("lfu", "sum", "sgd")
    state = Model(collection(case)).state_dict()
    model = sharded(case, state)
    other = {key: value + 1 for key, value in state.items()}
    other["ebc.embedding_bags.tt.cache.ids"] = torch.full((15,), -1)
    of_policy = {**other, "ebc.embedding_bags.tt.cache.ids": state["ebc.embedding_bags.tt.cache.ids"]}
    of_policy["ebc.embedding_bags.qr.cache.owners"] = state["ebc.embedding_bags.qr.cache.owners"].clone()
    of_policy["ebc.embedding_bags.qr.cache.owners"][-1] = MARKS["lru"]
    messages = []
    for refused in (other, of_policy):
        try:
            model.load_state_dict(refused)
        except ConfigError as error:
            messages.append(str(error))
    moved = {key: _difference(value, state[key]) for key, value in model.state_dict().items()}
    message, policy = messages
    return {"message": message, "of_policy": policy, "moved": {key: by for key, by in moved.items() if by}}


def gathered(rank: int) -> Found:
    """What ``recemb train`` saves: all of the model on rank 0, ids beyond float32's integers too."""
    case = CachedCase("lfu", "sum", "sgd")
    reference = Model(collection(case))
    with torch.no_grad():
        for cache in reference.ebc.hot_row_caches().values():
            cache.owners.copy_(torch.arange(cache.owners.numel()) + 2**24 + 1)
    state = reference.state_dict()
    whole = whole_weights(sharded(case, state), World(Launch(rank=rank, size=2)))
    return {
        "keys": sorted(whole) == (sorted(state) if rank == 0 else []),
        "equal": all(torch.equal(value, state[key]) for key, value in whole.items()),
    }


def fresh(rank: int) -> Found:
    """Parameters drawn anew, and empty caches."""
    case = CachedCase("lfu", "sum", "sgd")
    model = sharded(case, Model(collection(case)).state_dict())
    optimizer = stepper(model)
    for at in range(4):
        step(model, optimizer, batch(10 * at + rank, case))
    filled = {name: found.cached_rows for name, found in model.module.ebc.cache_metrics().items()}
    model.module.ebc.reset_parameters()
    caches = model.module.ebc.hot_row_caches()
    return {
        "filled": filled,
        "left": {name: found.cached_rows for name, found in model.module.ebc.cache_metrics().items()},
        "steps": {name: cache.host_value("steps") for name, cache in caches.items()},
    }


def left_whole(rank: int) -> Found:
    """What is said of cached tables that every rank has whole, and how far its weights are from rank 0's."""
    case = CachedCase("lfu", "sum", None)
    models = {
        "without sharders": lambda own: DistributedModelParallel(own),
        "not broadcast": lambda own: DistributedDataParallel(own, broadcast_buffers=False),
        "broadcast": lambda own: DistributedDataParallel(own),
        "evaluated": lambda own: DistributedDataParallel(own, broadcast_buffers=False).eval(),
        "frozen": lambda own: DistributedDataParallel(own, broadcast_buffers=False),
    }
    found: Found = {}
    for name, wrapped in models.items():
        own = Model(collection(case))
        if name == "frozen":
            for table in CACHED:
                own.ebc.embedding_bags[table].requires_grad_(False)
        start = {key: value.clone() for key, value in own.state_dict().items()}
        model, message = wrapped(own), ""
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        try:
            for at in range(STEPS):
                optimizer.zero_grad()
                model(batch(10 * at + rank, case))[0].backward()
                optimizer.step()
        except ConfigError as error:
            message = str(error)
        moved = {key for key, value in own.state_dict().items() if not torch.equal(value, start[key])}
        filled = min(cache.cached_rows for cache in own.ebc.cache_metrics().values())
        found[name] = {"message": message, "apart": apart(own), "moved": sorted(moved), "filled": filled}
    return found


def apart(own: Model) -> float:
    """How far this rank's tables are from the first one's."""
    tables = torch.stack([own.ebc.to_dense(table).sum(1) for table in CACHED])
    first = tables.clone()
    dist.broadcast(first, 0)
    return float((tables - first).abs().max())


class Sometimes(nn.Module):
    """A model whose tables a rank may leave out of a forward, or look up more than once."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model, self.bias = model, nn.Parameter(torch.ones(1))

    def forward(self, features: KeyedJaggedTensor, times: int = 1) -> Tensor:
        return self.bias.sum() + sum(self.model(features)[0] for _ in range(times))


# What one rank alone does at a step; or all of them ("evaluated").
ALONE = ("holds a graph", "has no gradient", "accumulates more", "looks up twice", "beside", "evaluated")


def replicas(rank: int) -> Found:
    """Two ranks under DistributedDataParallel, which differ in what would keep an exchange back."""
    case = CachedCase("lru", "sum", None)
    found: Found = {}
    for name in ALONE:
        own = Model(collection(case))
        model = DistributedDataParallel(Sometimes(own), find_unused_parameters=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        exchanged: list[int] = []
        graph: Tensor | None = None
        for at in range(2 * STEPS):
            features, turn = batch(10 * at + rank, case), rank == at % 2
            if name in ("beside", "holds a graph") and rank == 0:
                graph = own(features)[0] if name == "holds a graph" else None
                own(features)
            if name in ("has no gradient", "accumulates more"):
                with model.no_sync():
                    for _ in range(1 + (name == "accumulates more" and rank)):
                        (model(features) * float(name == "accumulates more" or turn)).backward()
            model(features, 1 + (name == "looks up twice" and turn)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if name == "evaluated":
                with torch.no_grad():
                    model(features)
            exchanged.append(int(own.ebc.hot_row_caches()["tt"].refreshed))
        found[name] = {"apart": apart(own), "exchanged": exchanged, "held": graph is not None}
    return found


def left_out(rank: int) -> Found:
    """A rank that leaves the tables out of a forward in which the other one exchanges rows."""
    own = Model(collection(CachedCase("lru", "sum", None)))
    model, message = DistributedDataParallel(Sometimes(own), find_unused_parameters=True), ""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for at in range(2 * STEPS):
        times = 0 if rank and at == STEPS else 1
        try:
            loss = model(batch(10 * at + rank, CachedCase("lru", "sum", None)), times)
        except ConfigError as error:
            message = str(error)
        told = torch.tensor([len(message)])
        dist.all_reduce(told)
        if int(told):
            return {"message": message, "at": at}
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"message": "", "at": -1}


def pipeline(rank: int) -> Found:
    """torchrec's pipelines against the plain loop, bit for bit, caches and all."""
    case = CachedCase("importance", "sum", "adagrad")
    state = Model(collection(case)).state_dict()
    batches = [batch(10 * at + rank, case) for at in range(STEPS)]
    plain = sharded(case, state)
    optimizer = stepper(plain)
    for features in batches:
        step(plain, optimizer, features)
    own, found = local_state(plain), {}
    for kind in (TrainPipelineSparseDist, PrefetchTrainPipelineSparseDist):
        piped = sharded(case, state)
        _, prepared = through(kind, piped, stepper(piped), batches)
        other = local_state(piped)
        found[kind.__name__] = {
            "equal": {key: torch.equal(own[key], other[key]) for key in own},
            "prepared": prepared,
            "evictions": min((m.evictions for m in piped.module.ebc.cache_metrics().values()), default=None),
        }
    return found


def main(rank: int, world: int, folder: Path) -> None:
    join(rank, world, folder)
    runs: dict[str, Callable[[], Found]] = {
        str(case): (lambda case=case: parity(rank, case)) for case in CASES
    }
    runs["frozen"] = lambda: parity(rank, CachedCase("lfu", "sum", "adagrad"), ("qr", "tt"))
    runs["accumulated"] = lambda: parity(rank, CachedCase("lfu", "sum", None), accumulate=3)
    for run in (
        pipeline,
        left_whole,
        replicas,
        left_out,
        looking_up,
        variable,
        another_cache,
        gathered,
        fresh,
    ):
        runs[run.__name__] = lambda run=run: run(rank)
    for kind in FORMATS:
        runs[kind] = lambda kind=kind: resharded(rank, kind, folder)
    run_all(rank, folder, runs)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
