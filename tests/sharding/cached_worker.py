"""One rank of the cached tables' tests; leaves what each case found in a file of JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist
from torchrec.optim.optimizers import in_backward_optimizer_filter

from recemb.cache.optimizer_state import reset_rows
from tests.sharding.cached_cases import (
    CASES,
    STEPS,
    CachedCase,
    Model,
    attach,
    batch,
    collection,
    sharded,
)
from tests.sharding.cases import BATCH, joined
from tests.sharding.shared import Found, held, join, local_state, run_all
from tests.sharding.worker import noted, prefetch_without_streams


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


def step(model: nn.Module, optimizer: torch.optim.Optimizer, features: Any) -> dict[str, Tensor]:
    optimizer.zero_grad()
    loss, columns = model(features)
    loss.backward()
    optimizer.step()
    return columns


def parity(rank: int, case: CachedCase) -> Found:
    """Steps beside the unsharded model on the ranks' batches together."""
    reference = Model(collection(case))
    attach(case, list(reference.ebc.parameters()))
    model = sharded(case, reference.state_dict())
    plain, own = stepper(reference), stepper(model)
    outputs: dict[str, float] = {}
    for at in range(STEPS):
        # Feature f2 has no ids on rank 0, and f6 none anywhere in the second step.
        local = [
            batch(10 * at + who, case, "f6" if at == 1 else "f2" if who == 0 else None) for who in (0, 1)
        ]
        expected = step(reference, plain, joined(local))
        for name, columns in step(model, own, local[rank]).items():
            difference = float((columns - expected[name][rank * BATCH :][:BATCH]).detach().abs().max())
            outputs[name] = max(difference, outputs.get(name, 0.0))
    after = reference.state_dict()
    state = model.state_dict()
    return {
        "outputs": outputs,
        "weights": {key: _difference(value, after[key]) for key, value in state.items()},
        "keys": sorted(state) == sorted(after),
        "fused": sorted(model.fused_optimizer.params),
        "metrics": {name: asdict(found) for name, found in model.module.ebc.cache_metrics().items()},
        "expected": {name: asdict(found) for name, found in reference.ebc.cache_metrics().items()},
    }


def _difference(value: Any, whole: Tensor) -> float | None:
    """Largest difference of what this rank holds; ``None`` where that is nothing."""
    parts = held(value)
    found = [float((part - whole[at]).abs().max()) for at, part in parts if part.numel()]
    return max(found) if found else None


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
        prepared: list[str] = []
        for kernel in piped.module.ebc._kernels():
            kernel._taken = partial(noted, kernel._taken, prepared)
        runner = kind(piped, stepper(piped), torch.device("cpu"))
        iterator = iter(batches)
        with patch(
            "torchrec.distributed.train_pipeline.train_pipelines.prefetch_embeddings",
            prefetch_without_streams,
        ):
            for _ in batches:
                runner.progress(iterator)
        other = local_state(piped)
        found[kind.__name__] = {
            "equal": {key: torch.equal(own[key], other[key]) for key in own},
            "prepared": len(prepared),
            "evictions": min((m.evictions for m in piped.module.ebc.cache_metrics().values()), default=None),
        }
    return found


def main(rank: int, world: int, folder: Path) -> None:
    join(rank, world, folder)
    runs: dict[str, Callable[[], Found]] = {
        str(case): (lambda case=case: parity(rank, case)) for case in CASES
    }
    for run in (pipeline,):
        runs[run.__name__] = lambda run=run: run(rank)
    run_all(rank, folder, runs)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
