"""The models and batches of the sharding tests, the same on every rank and in the tests' own process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torchrec
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import KeyedJaggedTensor, PoolingType
from torchrec.distributed.sharding_plan import construct_module_sharding_plan
from torchrec.distributed.types import EmbeddingModuleShardingPlan
from torchrec.modules.embedding_configs import DataType

from recemb import (
    ROBE,
    Compression,
    Dense,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    MixedDimension,
    QuotientRemainder,
    TensorTrain,
)
from recemb.torchrec_io import EmbeddingBagCollectionSharder
from tests.sharding.places import COMPRESSED, Case

BATCH, STEPS = 6, 3
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.5}),
    # Epsilons beyond the rounding of gradients, which both would blow up to full steps.
    "adam": (torch.optim.Adam, {"lr": 0.02, "eps": 1e-2}),
    "rowwise_adagrad": (torchrec.optim.RowWiseAdagrad, {"lr": 0.05, "eps": 1e-5}),
}
DENSE_LR = 0.5
# One parameter of each of three tables.
PARTLY_FROZEN = ("tt.core_1", "qr.r", "md.p")
N = 400
BAD_ID = 12345
# Feature f0 is looked up in two tables, table qr serves two features, and two tables share a ROBE array.
TABLES: dict[str, tuple[int, list[str], Compression]] = {
    "d_rw": (16, ["f0"], Dense()),
    "tt": (16, ["f1"], TensorTrain(rank=4)),
    "d_tw": (16, ["f2"], Dense()),
    "qr": (8, ["f3", "f4"], QuotientRemainder(collisions=20, operation="mult")),
    "robe_a": (16, ["f5"], ROBE(compress_rate=10, block_size=8)),
    "d_dp": (8, ["f6"], Dense()),
    "md": (16, ["f0"], MixedDimension(dim=4)),
    "robe_b": (16, ["f7"], ROBE(compress_rate=10, block_size=8)),
    "d_cw": (16, ["f2"], Dense()),
    # More remainders than quotients: those are what is cut row-wise.
    "qr_cat": (8, ["f6"], QuotientRemainder(collisions=50, operation="concat")),
}
KEYS = [f"f{k}" for k in range(8)]


class Model(nn.Module):
    """A collection and a linear layer over its columns, by name: the order differs when sharded."""

    def __init__(self, ebc: EmbeddingBagCollection) -> None:
        super().__init__()
        self.ebc = ebc
        self.names = sorted(ebc._embedding_names)
        torch.manual_seed(7)
        self.lin = nn.Linear(sum(dim * len(features) for dim, features, _ in TABLES.values()), 3)

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        pooled = self.ebc(features)
        columns = torch.cat([pooled[name] for name in self.names], dim=1)
        return self.lin(columns).square().mean(), columns


def collection(case: Case, device: str = "cpu", half: str | None = None) -> EmbeddingBagCollection:
    means = {"mean": set(TABLES), "mixed_pooling": {"d_rw", "tt", "robe_a", "d_dp"}}.get(case.pooling, set())
    torch.manual_seed(3)
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name,
                num_embeddings=N,
                embedding_dim=dim,
                feature_names=list(features),
                pooling=PoolingType.MEAN if name in means else PoolingType.SUM,
                compression=compression,
                data_type=DataType.BF16 if name == half else DataType.FP32,
                weight_init_min=-0.5,
                weight_init_max=0.5,
            )
            for name, (dim, features, compression) in TABLES.items()
        ],
        is_weighted=case.pooling == "weighted",
        device=device,
    )


def plan(case: Case, ebc: EmbeddingBagCollection) -> EmbeddingModuleShardingPlan:
    ways = case.ways()
    return construct_module_sharding_plan(
        ebc,
        {name: ways[name] for name in TABLES},
        sharder=EmbeddingBagCollectionSharder(),
        local_size=2,
        world_size=case.world,
        device_type="cpu",
    )


def is_fused(case: Case, key: str) -> bool:
    """Whether the optimizer steps on this parameter in the backward once sharded.

    torchrec leaves replicated uncompressed tables to the optimizer of the dense layers.
    """
    _, _, table = key.partition("embedding_bags.")
    name = table.partition(".")[0]
    replicated = bool(table) and name not in COMPRESSED and case.places[name] is None
    return bool(table) and case.optimizer is not None and not replicated


def attach(case: Case, parameters: Sequence[nn.Parameter]) -> None:
    if case.optimizer is not None:
        kind, arguments = OPTIMIZERS[case.optimizer]
        apply_optimizer_in_backward(kind, parameters, dict(arguments))


def batch(seed: int, case: Case, empty: str | None = None, size: int = BATCH) -> KeyedJaggedTensor:
    """One rank's ``size`` samples, with ids that repeat and bags of 0 to 3; feature ``empty`` has no ids."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(KEYS), size), generator=generator)
    if empty is not None:
        lengths[KEYS.index(empty)] = 0
    count = int(lengths.sum())
    weights = torch.rand(count, generator=generator) if case.pooling == "weighted" else None
    ids = torch.randint(0, N // 8, (count,), generator=generator) * 7 % N
    return KeyedJaggedTensor(KEYS, ids, lengths=lengths.flatten(), weights=weights)


def joined(batches: Sequence[KeyedJaggedTensor]) -> KeyedJaggedTensor:
    """The ranks' batches, one after the other."""
    parts = [part[key] for key in KEYS for part in batches]
    weights = [part.weights_or_none() for part in parts]
    return KeyedJaggedTensor(
        KEYS,
        torch.cat([part.values() for part in parts]),
        lengths=torch.cat([part.lengths() for part in parts]),
        weights=None if weights[0] is None else torch.cat(weights),
    )


def variable_batch(rank: int) -> KeyedJaggedTensor:
    """A batch whose features are deduplicated to sizes of their own, which differ by rank."""
    generator = torch.Generator().manual_seed(50 + rank)
    strides = torch.randint(1, BATCH, (len(KEYS),), generator=generator).tolist()
    lengths = torch.randint(0, 4, (sum(strides),), generator=generator)
    inverse = torch.stack([torch.randint(0, size, (BATCH,), generator=generator) for size in strides])
    return KeyedJaggedTensor(
        KEYS,
        torch.randint(0, N, (int(lengths.sum()),), generator=generator),
        lengths=lengths,
        stride_per_key_per_rank=[[size] for size in strides],
        inverse_indices=(KEYS, inverse),
    )
