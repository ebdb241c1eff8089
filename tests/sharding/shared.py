"""Sharded models of the tests, and what a rank holds of them."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from recemb.torchrec_io import get_sharders
from tests.processes import run_ranks
from tests.sharding.cases import DENSE_LR, Model, attach, collection, plan
from tests.sharding.places import Case

Found = dict[str, Any]
TIMEOUT = timedelta(seconds=20)
SECONDS = 150


def join(rank: int, world: int, folder: Path) -> None:
    """Make this process one of the ranks that have ``folder`` in common."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)


def run_all(rank: int, folder: Path, runs: Mapping[str, Callable[[], Found]]) -> None:
    """Run every case, and leave what each found in a file of JSON for :func:`of_ranks`."""
    found: dict[str, Found] = {}
    for name, run in runs.items():
        try:
            found[name] = run()
        except Exception:
            found[name] = {"error": traceback.format_exc()}
        (folder / f"rank{rank}.json").write_text(json.dumps(found))


def of_ranks(module: str, world: int, folder: Path) -> list[Found]:
    """What each rank of ``python -m module rank world folder`` has left."""
    folder.mkdir()
    ended = run_ranks(module, world, [world, folder], folder, SECONDS)
    files = [folder / f"rank{rank}.json" for rank in range(world)]
    missing = [path for path in files if not path.exists()]
    assert not missing, "".join(ended.said)
    return [json.loads(path.read_text()) for path in files]


def of_case(every: list[Found], name: str) -> list[Found]:
    """What each rank found in one case."""
    each = [rank[name] for rank in every]
    errors = [one["error"] for one in each if "error" in one]
    assert not errors, "\n".join(errors)
    return each


def sharded(case: Case, state: dict[str, Tensor], slices: int = 1) -> DistributedModelParallel:
    """The model on all ranks, with the weights of an unsharded one, or fresh ones."""
    model = Model(collection(case, "meta"))
    attach(case, list(model.ebc.parameters()))
    return distributed(case, model, state, slices)


def distributed(
    case: Case, model: Model, state: dict[str, Tensor], slices: int = 1
) -> DistributedModelParallel:
    made = DistributedModelParallel(
        model,
        device=torch.device("cpu"),
        plan=ShardingPlan({"ebc": plan(case, model.ebc)}),
        sharders=get_sharders(slices),
    )
    if state:
        made.load_state_dict({key: value.clone() for key, value in state.items()})
    return made


def dense_optimizer(model: DistributedModelParallel) -> KeyedOptimizerWrapper:
    parameters = dict(in_backward_optimizer_filter(model.named_parameters()))
    return KeyedOptimizerWrapper(parameters, lambda own: torch.optim.SGD(own, lr=DENSE_LR))


def held(value: Any) -> list[tuple[tuple[Any, ...], Tensor]]:
    """What this rank holds of a tensor of a state dict, and where in the whole it lies."""
    if not isinstance(value, ShardedTensor):
        return [((...,), value)]
    return [
        (
            tuple(
                slice(start, start + size)
                for start, size in zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True)
            ),
            shard.tensor,
        )
        for shard in value.local_shards()
    ]


def differences(state: dict[str, Any], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of what this rank holds of each tensor."""
    return {
        key: max((float((part - expected[key][at]).abs().max()) for at, part in held(value)), default=0.0)
        for key, value in state.items()
    }


def local_state(model: DistributedModelParallel) -> dict[str, Tensor]:
    """What this rank holds, the first shard of each tensor."""
    return {
        key: value.local_shards()[0].tensor if isinstance(value, ShardedTensor) else value
        for key, value in model.state_dict().items()
        if not isinstance(value, ShardedTensor) or value.local_shards()
    }
