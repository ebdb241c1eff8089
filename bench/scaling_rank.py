"""One rank of ``bench.scaling``: times the models in turns, all ranks together, and counts what it sends."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from fractions import Fraction
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, data_parallel, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.optimizers import in_backward_optimizer_filter

from bench.ids import make_batches
from bench.ours import build_collection, table_bytes, table_specs
from bench.peers import feature_names
from bench.scaling import Asked
from bench.settings import DENSE, KAGGLE, LARGEST_TT
from bench.traffic import Traffic, counted, expected, linked
from recemb import Dense
from recemb.data.synthetic import scaled_cardinalities
from recemb.models import dlrm
from recemb.spec import TableSpec
from recemb.torchrec_io import EmbeddingBagCollectionSharder, get_sharders

REPLICATED = f"{LARGEST_TT}, on every rank"
TABLE_WISE = f"{LARGEST_TT}, table-wise"
_SLICES = 4
DENSE_SLICED, TABLE_WISE_SLICED = f"{DENSE}, {_SLICES} slices", f"{TABLE_WISE}, {_SLICES} slices"
# Each with its tables and its slices.
MODELS = {
    DENSE: (DENSE, 1),
    DENSE_SLICED: (DENSE, _SLICES),
    REPLICATED: (LARGEST_TT, 1),
    TABLE_WISE: (LARGEST_TT, 1),
    TABLE_WISE_SLICED: (LARGEST_TT, _SLICES),
}
_DENSE_FEATURES, _WARM_UP = 13, 3
_DENSE_ARCH, _OVER_ARCH = (512, 256, 16), (512, 512, 256, 1)
_PATH = "sparse_arch.embedding_bag_collection"


@dataclass(frozen=True)
class Measured:
    """One model on one number of ranks.

    Args:
        seconds: of each round, of the slowest rank.
        traffic: what this rank's tables sent in one step; ``expected``, what the design says.
    """

    model: str
    table_bytes: int
    rank_bytes: int
    seconds: list[float]
    traffic: dict[str, float]
    expected: dict[str, float]


def places_of(model: str, specs: Sequence[TableSpec], world: int) -> list[int | None]:
    """The rank of each table: the largest first, to the rank that has the fewest bytes."""
    loads, found = [0] * world, {}
    for spec in sorted(specs, key=lambda spec: -table_bytes([spec])):
        if model == REPLICATED and not isinstance(spec.compression, Dense):
            found[spec.name] = None
            continue
        rank = loads.index(min(loads))
        loads[rank] += table_bytes([spec])
        found[spec.name] = rank
    return [found[spec.name] for spec in specs]


class Model:
    """A sharded DLRM and its training step."""

    def __init__(self, model: str, scale: Fraction, batch: int, world: int, rank: int) -> None:
        self.setting = replace(KAGGLE, rows=tuple(scaled_cardinalities(scale)), batch=batch)
        tables, slices = MODELS[model]
        self.specs = table_specs(tables, self.setting.rows, self.setting.dim)
        self.places = places_of(model, self.specs, world)
        collection = build_collection(self.specs, self.setting.optimizer, device="meta")
        torch.manual_seed(0)
        whole = dlrm(collection, _DENSE_FEATURES, _DENSE_ARCH, _OVER_ARCH)
        plan = construct_module_sharding_plan(
            collection,
            {
                spec.name: data_parallel() if place is None else table_wise(place)
                for spec, place in zip(self.specs, self.places, strict=True)
            },
            sharder=EmbeddingBagCollectionSharder(),
            local_size=world,
            world_size=world,
            device_type="cpu",
        )
        self.module = DistributedModelParallel(
            whole, device=torch.device("cpu"), plan=ShardingPlan({_PATH: plan}), sharders=get_sharders(slices)
        )
        self.names = feature_names(len(self.specs))
        dense = dict(in_backward_optimizer_filter(self.module.named_parameters()))
        self.optimizer = torch.optim.Adagrad(dense.values(), lr=0.01)
        generator = torch.Generator().manual_seed(rank)
        self.inputs = torch.rand(batch, _DENSE_FEATURES, generator=generator)
        self.labels = torch.bernoulli(torch.full((batch,), 0.256), generator=generator)

    def step(self, ids: Tensor, lengths: Tensor) -> None:
        """Forward, loss, backward, all updates."""
        features = KeyedJaggedTensor(keys=self.names, values=ids, lengths=lengths)
        self.optimizer.zero_grad()
        logits = self.module(self.inputs, features).squeeze(1)
        F.binary_cross_entropy_with_logits(logits, self.labels).backward()
        self.optimizer.step()

    def bytes_of(self, rank: int) -> tuple[int, int]:
        """Parameters that are replicated, and those on ``rank`` with them."""
        replicated = sum(table_bytes([s]) for s, p in zip(self.specs, self.places, strict=True) if p is None)
        own = sum(table_bytes([s]) for s, p in zip(self.specs, self.places, strict=True) if p == rank)
        return replicated, own + replicated


def measure(asked: Asked) -> list[Measured]:
    """Every model in turns, round by round, each from a barrier on."""
    rank, gbits = dist.get_rank(), asked.link_gbits
    scale = Fraction(asked.scale)
    made = {name: Model(name, scale, asked.batch, asked.world, rank) for name in asked.models}
    batches = make_batches(next(iter(made.values())).setting, seed=rank)
    times: dict[str, list[float]] = {name: [] for name in asked.models}
    traffic: dict[str, Traffic] = {}
    for turn in range(-_WARM_UP, asked.rounds):
        for name, model in made.items():
            given = batches[turn % len(batches)]
            dist.barrier()
            if turn == -1:
                with counted() as traffic[name]:
                    model.step(given.ids, given.lengths)
                continue
            with nullcontext() if gbits is None else linked(gbits):
                started = time.perf_counter()
                model.step(given.ids, given.lengths)
            took = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if turn >= 0:
                times[name].append(float(took))
    found = []
    for name, model in made.items():
        replicated, own = model.bytes_of(rank)
        design = expected(rank, asked.world, asked.batch, model.setting.dim, 1, model.places, replicated)
        whole = table_bytes(model.specs)
        sent, said = asdict(traffic[name]), asdict(design)
        found.append(Measured(name, whole, own, times[name], sent, said))
    return found


def main(rank: int, folder: Path) -> None:
    asked = Asked(**json.loads((folder / "asked.json").read_text()))
    torch.set_num_threads(asked.threads)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), asked.world),
        rank=rank,
        world_size=asked.world,
        timeout=timedelta(seconds=asked.timeout),
    )
    found = measure(asked)
    (folder / f"rank{rank}.json").write_text(json.dumps([asdict(one) for one in found]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
