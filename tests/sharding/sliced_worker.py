"""One rank: the same steps with the tables in one slice and in several, and what happens when."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist
from torchrec.distributed.types import ShardingPlan
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.torchrec_io import EmbeddingBagCollectionSharder
from recemb.torchrec_io.sharding.kernel import CompressedKernel
from tests.sharding.cases import STEPS, Model, batch, collection, plan, variable_batch
from tests.sharding.places import Case
from tests.sharding.shared import Found, dense_optimizer, held, join, local_state, run_all, sharded
from tests.sharding.worker import through

CASES = [
    Case("table_wise", "weighted", "rowwise_adagrad"),
    Case("row_wise", "mean", "sgd"),
    Case("mixed", "mixed_pooling", None),
    Case("empty_rank", "sum", "sgd"),
    Case("adam_replicated", "sum", "adam"),
    Case("four_whole", "sum", "rowwise_adagrad", 4),
    Case("four", "mixed_pooling", "rowwise_adagrad", 4),
]
SLICES = (2, 3, 20)
# Two compressed tables on either rank, and nothing else that is exchanged.
ORDERED = Case("table_wise", "sum", "sgd")


def train(model: DistributedModelParallel, batches: list[KeyedJaggedTensor]) -> list[Tensor]:
    """Steps through the batches; what the collection gave for each."""
    dense, outputs = dense_optimizer(model), []
    for features in batches:
        dense.zero_grad()
        loss, columns = model(features)
        loss.backward()
        dense.step()
        outputs.append(columns.detach())
    return outputs


def equal(rank: int, case: Case) -> Found:
    """Outputs, weights and optimizer state against those of one slice."""
    state = Model(collection(case)).state_dict()
    batches = [batch(10 * step + rank, case) for step in range(STEPS)]
    plain = sharded(case, state)
    outputs = train(plain, batches)
    found: Found = {}
    for slices in SLICES:
        model = sharded(case, state, slices)
        own = train(model, batches)
        found[str(slices)] = {
            "kinds": list(model.module.ebc.sharding_type_to_sharding_infos),
            "types": model.module.ebc._sharding_types,
            "tables": sorted(name for kernel in model.module.ebc._kernels() for name in kernel.backends),
            "outputs": float((torch.cat(own) - torch.cat(outputs)).abs().max()),
            "different": different(model, plain),
            "keys": sorted(model.state_dict()) == sorted(plain.state_dict()),
            "moved": moved(model, state),
        }
    return found


def different(model: DistributedModelParallel, other: DistributedModelParallel) -> dict[str, float]:
    """By how much this rank's weights and optimizer state differ; what is the same is left out."""
    own, wanted = every(model), every(other)
    assert own.keys() == wanted.keys()
    far = {
        key: float((own[key].double() - wanted[key].double()).abs().max()) for key in own if own[key].numel()
    }
    return {key: by for key, by in far.items() if by != 0}


def every(model: DistributedModelParallel) -> dict[str, Tensor]:
    """This rank's parts of the weights and of the state of the fused optimizers."""
    found = dict(model.state_dict())
    for key, parts in model.fused_optimizer.state_dict()["state"].items():
        found |= {f"{key}.{name}": part for name, part in parts.items()}
    return {f"{key}[{k}]": part for key in found for k, (_, part) in enumerate(held(found[key]))}


def moved(model: DistributedModelParallel, state: dict[str, Tensor]) -> int:
    """How many of this rank's whole tensors training has changed."""
    own = local_state(model)
    return sum(own[key].shape == state[key].shape and not torch.equal(own[key], state[key]) for key in own)


def pipelines(rank: int) -> Found:
    """Both of torchrec's pipelines with slices against the plain loop without."""
    case = Case("mixed", "sum", "sgd")
    state = Model(collection(case)).state_dict()
    batches = [batch(10 * step + rank, case) for step in range(5)]
    plain = sharded(case, state)
    train(plain, batches)
    found: Found = {}
    for kind in (TrainPipelineSparseDist, PrefetchTrainPipelineSparseDist):
        piped = sharded(case, state, 2)
        _, prepared = through(kind, piped, dense_optimizer(piped), batches)
        found[kind.__name__] = {"different": different(piped, plain), "prepared": prepared}
    return found


def resumed(rank: int) -> Found:
    """Weights and optimizer state of one slice go on in three."""
    case = CASES[0]
    batches = [batch(10 * step + rank, case) for step in range(2 * STEPS)]
    plain, other = sharded(case, Model(collection(case)).state_dict()), sharded(case, {}, 3)
    train(plain, batches[:STEPS])
    other.load_state_dict(plain.state_dict())
    other.fused_optimizer.load_state_dict(plain.fused_optimizer.state_dict())
    train(plain, batches[STEPS:])
    train(other, batches[STEPS:])
    return {"different": different(other, plain)}


def ordered(rank: int) -> Found:
    """The order of look-ups that a user asks for, with slices."""
    case = CASES[1]
    model = Model(collection(case, "meta"))
    sharder = EmbeddingBagCollectionSharder(
        sharded_module_order_overwrite=["table_wise", "data_parallel", "row_wise"], communication_slices=2
    )
    made = DistributedModelParallel(
        model,
        device=torch.device("cpu"),
        plan=ShardingPlan({"ebc": plan(case, model.ebc)}),
        sharders=[sharder],
    )
    return {"types": made.module.ebc._sharding_types}


def variable(rank: int) -> Found:
    """A batch size per feature."""
    case = Case("variable", "sum", "sgd")
    state = Model(collection(case)).state_dict()
    models = [sharded(case, state, slices) for slices in (1, 2)]
    outputs = [train(model, [variable_batch(rank)])[0] for model in models]
    return {
        "outputs": float((outputs[0] - outputs[1]).abs().max()),
        "different": different(models[1], models[0]),
    }


def order(rank: int) -> Found:
    """When rows are computed, sent and awaited in a step of one slice and of two."""
    found: Found = {}
    for slices in (1, 2):
        model = sharded(ORDERED, Model(collection(ORDERED)).state_dict(), slices)
        model(batch(rank, ORDERED))
        with logged() as events:
            loss, _ = model(batch(rank, ORDERED))
            events.append("loss")
            loss.backward()
        found[str(slices)] = events
    return found


@contextmanager
def logged() -> Iterator[list[str]]:
    """Note when float rows are sent and awaited, and when the kernels run."""
    events: list[str] = []
    exchange, forward = dist.all_to_all_single, CompressedKernel.forward

    def all_to_all_single(output: Tensor, input: Tensor, *rest: Any, **named: Any) -> Any:
        work = exchange(output, input, *rest, **named)
        if work is None or not input.is_floating_point():
            return work
        events.append("send")
        return _Noted(work, events)

    def computed(self: CompressedKernel, features: KeyedJaggedTensor) -> Tensor:
        pooled = forward(self, features)
        events.append("compute")
        pooled.register_hook(lambda _: events.append("step"))
        return pooled

    with (
        patch.object(dist, "all_to_all_single", all_to_all_single),
        patch.object(CompressedKernel, "forward", computed),
    ):
        yield events


class _Noted(dist.Work):
    """An exchange under way."""

    def __init__(self, work: Any, events: list[str]) -> None:
        super().__init__()
        self._work, self._events = work, events

    def wait(self, *arguments: Any) -> Any:
        self._events.append("wait")
        return self._work.wait(*arguments)


def main(rank: int, world: int, folder: Path) -> None:
    join(rank, world, folder)
    runs: dict[str, Callable[[], Found]] = {
        str(case): (lambda case=case: equal(rank, case)) for case in CASES if case.world == world
    }
    if world == 2:
        for run in (pipelines, resumed, ordered, variable, order):
            runs[run.__name__] = lambda run=run: run(rank)
    run_all(rank, folder, runs)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
