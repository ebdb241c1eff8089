"""Collections whose tables keep hot rows, for the tests of their sharding: the same in every process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, cast

import torch
import torchrec
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import KeyedJaggedTensor, PoolingType
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingPlan

from recemb import (
    ROBE,
    Compression,
    Dense,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    HotRows,
    MixedDimension,
    QuotientRemainder,
    TensorTrain,
)
from recemb.torchrec_io import EmbeddingBagCollectionSharder, get_sharders
from tests.sharding import cases
from tests.sharding.places import Case

STEPS = 9
N = cases.N
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.3}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
    "rowwise_adagrad": (torchrec.optim.RowWiseAdagrad, {"lr": 0.05, "eps": 1e-6}),
}
# Bags of up to 3 of 50 ids: 14 slots turn over at every exchange.
CACHED = ("tt", "qr", "robe_a", "md")
# A table and its feature in two; a cached table beside one without in a ROBE array.
TABLES: dict[str, tuple[int, list[str]]] = {
    "d_rw": (16, ["f0"]),
    "tt": (16, ["f0", "f1"]),
    "qr": (8, ["f2"]),
    "robe_a": (16, ["f3"]),
    "plain_dp": (8, ["f4"]),
    "robe_b": (16, ["f5"]),
    "md": (16, ["f6"]),
    "md_rw": (16, ["f7"]),
    "d_dp": (8, ["f7"]),
}
PLACES: dict[str, dict[str, Any]] = {
    "both": {"tt": 0, "qr": 1, "robe_a": 1, "robe_b": 1, "md": 0},
    "swapped": {"tt": 1, "qr": 0, "robe_a": 0, "robe_b": 0, "md": 1},
    "one_rank": {"tt": 1, "qr": 1, "robe_a": 1, "robe_b": 1, "md": 1},
    # torchrec's row-wise tables cannot go backward under a batch size per feature on gloo.
    "variable": {"tt": 0, "qr": 1, "robe_a": 1, "robe_b": 1, "md": 0, "d_rw": 0, "md_rw": 1},
}


@dataclass(frozen=True)
class CachedCase:
    """How hot rows are told, bags pooled and tables stepped (``None``: outside the backward), and where."""

    policy: str
    pooling: str
    optimizer: str | None
    place: str = "both"

    def __str__(self) -> str:
        return f"{self.policy}-{self.pooling}-{self.optimizer or 'dense'}-{self.place}"


CASES = [
    *(CachedCase(*case) for case in product(("lfu", "lru", "importance"), ("sum",), OPTIMIZERS)),
    *(CachedCase("importance", pooling, "adagrad") for pooling in ("mean", "weighted")),
    CachedCase("lfu", "mean", "sgd", "one_rank"),
    CachedCase("importance", "sum", None),
    CachedCase("lru", "weighted", None, "swapped"),
]


class Model(nn.Module):
    """A collection; its loss is a sum over samples, and each sample's gradient its own, to the bit."""

    def __init__(self, ebc: EmbeddingBagCollection) -> None:
        super().__init__()
        self.ebc = ebc
        self.names = list(ebc._embedding_names)

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, dict[str, Tensor]]:
        pooled = self.ebc(features)
        columns = {name: pooled[name] for name in self.names}
        # A power of two, so that dividing by the samples of a rank and by the ranks loses no bit.
        samples = 2 ** (pooled.values().shape[0] - 1).bit_length()
        return torch.stack([part.square().sum() for part in columns.values()]).sum() / samples, columns


def compressions(policy: str) -> dict[str, Compression]:
    how = cast(Literal["lfu", "lru", "importance"], policy)
    hot = HotRows(rows=14, policy=how, warmup=1, refresh_every=2, track_every=1, decay=0.1)
    slow = HotRows(
        fraction=0.04, policy=how, warmup=2, refresh_every=3, track_every=2, decay=0.1, write_back=False
    )
    return {
        "d_rw": Dense(),
        "tt": TensorTrain(rank=4, cache=hot),
        "qr": QuotientRemainder(collisions=20, operation="mult", cache=hot),
        "robe_a": ROBE(compress_rate=10, block_size=8, cache=hot),
        "plain_dp": TensorTrain(rank=2),
        "robe_b": ROBE(compress_rate=10, block_size=8),
        "md": MixedDimension(dim=4, cache=slow),
        "md_rw": MixedDimension(dim=4),
        "d_dp": Dense(),
    }


def collection(case: CachedCase, device: str = "cpu") -> EmbeddingBagCollection:
    torch.manual_seed(3)
    made = compressions(case.policy)
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name,
                num_embeddings=N,
                embedding_dim=dim,
                feature_names=list(features),
                pooling=PoolingType.MEAN if case.pooling == "mean" else PoolingType.SUM,
                compression=made[name],
                weight_init_min=-0.5,
                weight_init_max=0.5,
            )
            for name, (dim, features) in TABLES.items()
        ],
        is_weighted=case.pooling == "weighted",
        device=device,
    )


def attach(case: CachedCase, parameters: Sequence[nn.Parameter]) -> None:
    if case.optimizer is not None:
        kind, arguments = OPTIMIZERS[case.optimizer]
        apply_optimizer_in_backward(kind, parameters, dict(arguments))


def sharded(
    case: CachedCase, state: dict[str, Tensor], frozen: Sequence[str] = ()
) -> DistributedModelParallel:
    """The model on two ranks, with the weights of an unsharded one, or fresh ones."""
    model = Model(collection(case, "meta"))
    for name in frozen:
        model.ebc.embedding_bags[name].requires_grad_(False)
    attach(case, [parameter for parameter in model.ebc.parameters() if parameter.requires_grad])
    dense = {"compute_kernel": "dense" if case.optimizer is None else "fused"}
    ways: dict[str, Any] = {"d_rw": row_wise(**dense), "md_rw": row_wise()}
    ways |= {"plain_dp": data_parallel(), "d_dp": data_parallel()}
    ways |= {name: table_wise(rank) for name, rank in PLACES[case.place].items()}
    plan = construct_module_sharding_plan(
        model.ebc,
        {name: ways[name] for name in TABLES},
        sharder=EmbeddingBagCollectionSharder(),
        local_size=2,
        world_size=2,
        device_type="cpu",
    )
    made = DistributedModelParallel(
        model, device=torch.device("cpu"), plan=ShardingPlan({"ebc": plan}), sharders=get_sharders()
    )
    if state:
        made.load_state_dict({key: value.clone() for key, value in state.items()})
    return made


def batch(seed: int, case: CachedCase, empty: str | None = None) -> KeyedJaggedTensor:
    """One rank's batch; see :func:`tests.sharding.cases.batch`."""
    return cases.batch(seed, cast(Case, case), empty)
