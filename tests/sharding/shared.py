"""Sharded models of the tests, and what a rank holds of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from recemb.torchrec_io import get_sharders
from tests.sharding.cases import DENSE_LR, Model, attach, collection, plan
from tests.sharding.places import Case

Found = dict[str, Any]


def sharded(case: Case, state: dict[str, Tensor]) -> DistributedModelParallel:
    """The model on all ranks, with the weights of an unsharded one, or fresh ones."""
    model = Model(collection(case, "meta"))
    attach(case, list(model.ebc.parameters()))
    return distributed(case, model, state)


def distributed(case: Case, model: Model, state: dict[str, Tensor]) -> DistributedModelParallel:
    made = DistributedModelParallel(
        model,
        device=torch.device("cpu"),
        plan=ShardingPlan({"ebc": plan(case, model.ebc)}),
        sharders=get_sharders(),
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
