"""One rank: runs every case, and leaves what each found in a file of JSON for the tests to read."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.bags import Bags
from recemb.errors import BatchError, ConfigError
from recemb.torchrec_io import get_sharders
from tests.sharding import processed, saved
from tests.sharding.cases import (
    BAD_ID,
    BATCH,
    DENSE_LR,
    PARTLY_FROZEN,
    STEPS,
    Model,
    attach,
    batch,
    collection,
    is_fused,
    joined,
    plan,
    variable_batch,
)
from tests.sharding.places import CASES, UNEVEN, Case
from tests.sharding.shared import (
    Found,
    dense_optimizer,
    differences,
    distributed,
    held,
    join,
    local_state,
    run_all,
    sharded,
)


def parity(rank: int, case: Case, sizes: Sequence[int] | None = None) -> Found:
    """Three steps beside the unsharded model on the ranks' batches together, of ``sizes`` or all of one."""
    sizes = sizes or [BATCH] * case.world
    start_row, share = sum(sizes[:rank]), sizes[rank] * case.world / sum(sizes)
    reference = Model(collection(case))
    start = {key: value.clone() for key, value in reference.state_dict().items()}
    model = sharded(case, start)
    named = dict(reference.named_parameters())
    attach(case, [parameter for key, parameter in named.items() if is_fused(case, key)])
    others = [parameter for key, parameter in named.items() if not is_fused(case, key)]
    plain, dense = torch.optim.SGD(others, lr=DENSE_LR), dense_optimizer(model)
    outputs = gradients = 0.0
    compared = set()
    for step in range(STEPS):
        # Feature f3 has no ids on rank 0; f5 none anywhere in the second step. Under Adam f0 has none in the
        # third, and the projection of its table moves all the same.
        nowhere = {1: "f5", 2: "f0" if case.optimizer == "adam" else None}.get(step)
        empty = [nowhere or ("f3" if at == 0 else None) for at in range(case.world)]
        local = [batch(10 * step + at, case, empty[at], sizes[at]) for at in range(case.world)]
        plain.zero_grad()
        loss, expected = reference(joined(local))
        loss.backward()
        dense.zero_grad()
        own_loss, columns = model(local[rank])
        # Ranks' gradients are averaged, and each loss is a mean over the rank's own samples.
        (own_loss * share).backward()
        apart = (columns - expected[start_row : start_row + sizes[rank]]).detach().abs()
        outputs = max([outputs, *apart.flatten().tolist()])
        places = {key: held(value) for key, value in model.state_dict().items()}
        for key, parameter in model.named_parameters():
            whole = named[key].grad
            # Of a column-wise table torchrec shows the first part alone; weights are compared below.
            if parameter.grad is None or whole is None or len(places[key]) != 1:
                continue
            wanted = whole[places[key][0][0]]
            if parameter.grad.shape == wanted.shape:
                compared.add(key)
                gradients = max(gradients, float((parameter.grad - wanted).abs().max()))
        plain.step()
        dense.step()
    state, after = model.state_dict(), reference.state_dict()
    moved = {key: float((value - start[key]).abs().max()) for key, value in after.items()}
    return {
        "outputs": outputs,
        "gradients": gradients,
        "compared": sorted(compared),
        "kernels": len(list(model.module.ebc._kernels())),
        "weights": differences(state, after),
        "moved": moved,
        "keys": sorted(state) == sorted(after),
        "fused": sorted(model.fused_optimizer.params),
        "dense": sorted(dense.params),
        "memory": [asdict(record) for record in model.module.ebc.memory()],
        "stored": stored(state),
    }


def stored(state: dict[str, Any]) -> dict[str, int]:
    """Bytes of each table on this rank; of both that share an array, those of the array."""
    found: dict[str, int] = {}
    for key, value in state.items():
        if key.startswith("ebc.embedding_bags."):
            name = key.split(".")[2]
            found[name] = found.get(name, 0) + sum(part.nbytes for _, part in held(value))
    return found


def round_trip(rank: int) -> Found:
    """Sharded weights gathered and loaded into a fresh unsharded module, and replicas that start equal."""
    case = Case("table_wise", "sum", "sgd")
    model = sharded(case, Model(collection(case)).state_dict())
    fresh = Model(collection(case))
    gathered = {}
    for key, value in model.state_dict().items():
        if isinstance(value, ShardedTensor):
            whole = torch.zeros(value.size())
            value.gather(0, whole if rank == 0 else None)
            dist.broadcast(whole, 0)
            gathered[key] = whole
        else:
            gathered[key] = value
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(gathered)
    replicated = Case("data_parallel", "sum", None)
    unsharded = Model(collection(replicated, "meta"))
    torch.manual_seed(rank)
    replicas = DistributedModelParallel(
        unsharded,
        device=torch.device("cpu"),
        plan=ShardingPlan({"ebc": plan(replicated, unsharded.ebc)}),
        sharders=get_sharders(),
    )
    mine = replicas.state_dict()["ebc.embedding_bags.tt.core_1"].clone()
    first = mine.clone()
    dist.broadcast(first, 0)
    return {
        "weights": differences(model.state_dict(), fresh.state_dict()),
        "replicas": float((mine - first).abs().max()),
        "spread": float(mine.std()),
    }


def variable(rank: int, place: str, world: int) -> Found:
    """A batch size per feature: outputs, and weights after a fused step."""
    case = Case(place, "sum", "sgd", world)
    reference = Model(collection(case))
    model = sharded(case, reference.state_dict())
    dense = dense_optimizer(model)
    plain = torch.optim.SGD(reference.parameters(), lr=DENSE_LR)
    results = [reference(variable_batch(at)) for at in range(case.world)]
    loss, columns = model(variable_batch(rank))
    difference = float((columns - results[rank][1]).detach().abs().max())
    (sum(result[0] for result in results) / case.world).backward()
    loss.backward()
    plain.step()
    dense.step()
    return {"outputs": difference, "weights": differences(model.state_dict(), reference.state_dict())}


def frozen(rank: int) -> Found:
    """Frozen tables stay as they are, wherever they lie, beside one that trains in half precision."""
    case = Case("variable", "sum", None)

    def small(device: str) -> Model:
        model = Model(collection(case, device, half="md"))
        for name in ("qr", "robe_a"):
            for parameter in model.ebc.embedding_bags[name].parameters():
                parameter.requires_grad_(False)
        attach(Case("variable", "sum", "sgd"), list(model.ebc.embedding_bags["md"].parameters()))
        return model

    reference = small("cpu")
    start = {key: value.clone() for key, value in reference.state_dict().items()}
    model = distributed(case, small("meta"), start)
    dense = dense_optimizer(model)
    loss, columns = model(batch(rank, case))
    loss.backward()
    dense.step()
    rows = slice(rank * BATCH, (rank + 1) * BATCH)
    expected = reference(joined([batch(at, case) for at in range(case.world)]))[1][rows]
    state = model.state_dict()
    return {
        "outputs": float((columns - expected).detach().abs().max()),
        "moved": differences(state, start),
        "dtype": str(state["ebc.embedding_bags.md.e"].dtype),
        "asks": sorted(key for key, value in model.named_parameters() if value.requires_grad),
    }


def partly_frozen(rank: int, place: str) -> Found:
    """Tables of which one parameter is frozen train under Adam as the unsharded ones do."""
    case = Case(place, "sum", "adam")

    def made(device: str) -> Model:
        model = Model(collection(case, device))
        for name, parameter in model.ebc.named_parameters():
            parameter.requires_grad_(not name.endswith(PARTLY_FROZEN))
        attach(case, [parameter for parameter in model.ebc.parameters() if parameter.requires_grad])
        return model

    reference = made("cpu")
    start = {key: value.clone() for key, value in reference.state_dict().items()}
    model = distributed(case, made("meta"), start)
    dense = dense_optimizer(model)
    plain = torch.optim.SGD(reference.lin.parameters(), lr=DENSE_LR)
    for step in range(STEPS):
        local = [batch(10 * step + at, case) for at in range(case.world)]
        for own, optimizer, features in ((reference, plain, joined(local)), (model, dense, local[rank])):
            optimizer.zero_grad()
            own(features)[0].backward()
            optimizer.step()
    return {
        "weights": differences(model.state_dict(), reference.state_dict()),
        "moved": differences(model.state_dict(), start),
    }


def another_table(rank: int) -> Found:
    """A state of another shape is refused on every rank before anything of the collection is loaded."""
    case = Case("table_wise", "sum", None)
    state = Model(collection(case)).state_dict()
    model = sharded(case, state)
    other = {key: value + 1 for key, value in state.items()}
    other["ebc.embedding_bags.tt.core_1"] = torch.zeros(3, 3)
    message = ""
    try:
        model.load_state_dict(other)
    except ConfigError as error:
        message = str(error)
    return {"message": message, "moved": differences(model.state_dict(), state)}


def schedule(rank: int) -> Found:
    """A learning rate set on ``DMP.fused_optimizer`` acts on the next backward."""
    case = Case("table_wise", "sum", "rowwise_adagrad")
    model = sharded(case, Model(collection(case)).state_dict())
    stepped: list[str] = []
    watched = []
    for key, parameter in model.named_parameters():
        for own in getattr(parameter, "_in_backward_optimizers", ()):
            if parameter.numel() and isinstance(own, torch.optim.Optimizer):
                watched.append(key)
                own.register_step_post_hook(lambda *_, key=key: stepped.append(key))
    optimizer = CombinedOptimizer([("", model.fused_optimizer), ("", dense_optimizer(model))])

    def step(lr: float) -> float:
        before = {key: value.detach().clone() for key, value in model.named_parameters()}
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        model(batch(rank, case))[0].backward()
        optimizer.step()
        return max(
            float((value.detach() - before[key]).abs().max())
            for key, value in model.named_parameters()
            if "tt" in key or "qr." in key
            if value.numel()
        )

    state = optimizer.state_dict()["state"]
    return {
        "still": step(0.0),
        "moves": step(0.5),
        "state": sorted(state),
        "stepped": stepped,
        "watched": watched,
    }


def pipeline(rank: int) -> Found:
    """torchrec's pipelines against the plain loop, bit for bit."""
    # In the second, torchrec cuts the compressed tables' part out of a batch that uncompressed ones share.
    return {key: value for place in ("mixed", "whole") for key, value in _piped(rank, place).items()}


def _piped(rank: int, place: str) -> Found:
    case = Case(place, "sum", "sgd")
    state = Model(collection(case)).state_dict()
    batches = [batch(10 * step + rank, case) for step in range(5)]
    plain = sharded(case, state)
    dense = dense_optimizer(plain)
    for features in batches:
        dense.zero_grad()
        loss, _ = plain(features)
        loss.backward()
        dense.step()
    own, found = local_state(plain), {}
    for kind in (TrainPipelineSparseDist, PrefetchTrainPipelineSparseDist):
        piped = sharded(case, state)
        outputs, prepared = through(kind, piped, dense_optimizer(piped), batches)
        other = local_state(piped)
        found[f"{kind.__name__} {place}"] = {
            "equal": {key: torch.equal(own[key], other[key]) for key in own},
            "shapes": [list(out.shape) for out in outputs],
            "prepared": prepared,
        }
    return found


def through(
    kind: type[TrainPipelineSparseDist[Any, Any]],
    model: DistributedModelParallel,
    optimizer: torch.optim.Optimizer,
    batches: list[KeyedJaggedTensor],
) -> tuple[list[Any], int]:
    """Train through a pipeline of torchrec's: its outputs, and how many batches were prepared ahead."""
    prepared: list[str] = []
    for kernel in model.module.ebc._kernels():
        kernel._taken = partial(noted, kernel._taken, prepared)
    runner = kind(model, optimizer, torch.device("cpu"))
    iterator = iter(batches)
    name = "torchrec.distributed.train_pipeline.train_pipelines.prefetch_embeddings"
    with patch(name, prefetch_without_streams):
        outputs = [runner.progress(iterator) for _ in batches]
    return outputs, len(prepared)


def prefetch_without_streams(context: Any, modules: list[Any], *_: Any) -> None:
    """torchrec's own, which does nothing without a GPU's streams, and its pipeline then fails."""
    for module in modules:
        name = module.forward._name
        ids = context.input_dist_tensors_requests.pop(name).wait()
        module.prefetch(ctx=context.module_contexts[name], dist_input=ids, forward_stream=None)
        context.module_input_post_prefetch[name] = ids
        context.module_contexts_post_prefetch[name] = context.module_contexts.pop(name)


def noted(taken: Callable[..., Bags | None], prepared: list[str], features: KeyedJaggedTensor) -> Bags | None:
    bags = taken(features)
    if bags is not None and (bags.ahead or (bags.split and bags.split.ahead)):
        prepared.append("")
    return bags


def left_whole(rank: int) -> Found:
    """What two look-ups warn of: without our sharders, with them, and replicated on purpose."""
    case = Case("table_wise", "sum", None)
    models = {
        "without sharders": lambda: DistributedModelParallel(Model(collection(case))),
        "without a plan": lambda: DistributedModelParallel(
            Model(collection(case)), plan=ShardingPlan({}), sharders=get_sharders()
        ),
        "sharded": lambda: sharded(case, {}),
        "by the user": lambda: DistributedDataParallel(Model(collection(case))),
    }
    found: Found = {}
    for name, made in models.items():
        model = made()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                model(batch(rank, case))[0].backward()
        found[name] = [str(warning.message) for warning in caught if "shard" in str(warning.message)]
    return found


def bad_id(rank: int) -> Found:
    """An id without a row on rank 0, of a table that lies on rank 1. Run last: it breaks the group."""
    case = Case("table_wise", "sum", "sgd")
    model = sharded(case, Model(collection(case)).state_dict())
    features = batch(rank, case)
    if rank == 0:
        features.values()[int(features.offsets()[3 * BATCH])] = BAD_ID
    before = time.monotonic()
    message, kind = "", ""
    try:
        model(features)[0].backward()
    except BatchError as error:
        message, kind = str(error), "BatchError"
    except RuntimeError as error:
        message, kind = str(error), "RuntimeError"
    return {"message": message, "kind": kind, "seconds": time.monotonic() - before}


def main(rank: int, world: int, folder: Path) -> None:
    join(rank, world, folder)
    runs: dict[str, Callable[[], Found]] = {
        str(case): (lambda case=case: parity(rank, case)) for case in CASES if case.world == world
    }
    for case, sizes in UNEVEN:
        if case.world == world:
            runs[f"{case} {sizes}"] = lambda case=case, sizes=sizes: parity(rank, case, sizes)
    for place in {2: ("variable", "variable_rows"), 4: ("variable_hosts",)}[world]:
        runs[place] = lambda place=place: variable(rank, place, world)
    if world == 2:
        for run in (round_trip, frozen, another_table, schedule, pipeline, left_whole):
            runs[run.__name__] = lambda run=run: run(rank)
        for place in ("adam", "adam_replicated"):
            runs[f"partly_frozen {place}"] = lambda place=place: partly_frozen(rank, place)
        for place in processed.PLACES:
            runs[f"processed {place}"] = lambda place=place: processed.parity(rank, place)
        runs["without_weights"] = lambda: processed.without_weights(rank)
        runs["other_plan"] = lambda: saved.other_plan(rank, folder)
    for kind in saved.FORMATS:
        runs[kind] = lambda kind=kind: saved.resharded(kind, world, folder)
    if world == 2:
        runs["bad_id"] = lambda: bad_id(rank)
    run_all(rank, folder, runs)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
