"""Keys of a batch: their order, and keys that no table has, may change from one batch to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import KeyedJaggedTensor, PoolingType
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ShardingPlan

from recemb import (
    Dense,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    HotRows,
    MixedDimension,
    QuotientRemainder,
    TensorTrain,
)
from recemb.errors import BatchError
from recemb.torchrec_io import EmbeddingBagCollectionSharder, get_sharders

ROWS, SIZE = 50, 4
TABLES = {
    "d": (["f0"], Dense()),
    "tt": (["f1"], TensorTrain(rank=2, cache=HotRows(rows=3, warmup=1, refresh_every=2, track_every=1))),
    "qr": (["f2", "f0"], QuotientRemainder(collisions=5)),
    "md": (["f3"], MixedDimension(dim=2)),
}
# The first batch's, then others: keys reversed, one more in front, one that no table has gone, all of it.
KEYS = [
    ["f0", "f1", "none", "f2", "f3"],
    ["f3", "f2", "none", "f1", "f0"],
    ["other", "f0", "f1", "none", "f2", "f3"],
    ["f0", "f1", "f2", "f3"],
    ["f2", "other", "f0", "f3", "f1", "more"],
    ["f0", "f1", "none", "f2", "f3"],
]


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Model(torch.nn.Module):
    def __init__(self, ebc: EmbeddingBagCollection) -> None:
        super().__init__()
        self.ebc = ebc

    def forward(self, features: KeyedJaggedTensor) -> Any:
        return self.ebc(features)


def made(kind: str) -> Model:
    torch.manual_seed(0)
    ebc = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name,
                num_embeddings=ROWS,
                embedding_dim=8,
                feature_names=list(features),
                compression=compression,
                # A mean of a table that is cut by rows is recemb's own to take.
                pooling=PoolingType.MEAN if kind == "mean" else PoolingType.SUM,
            )
            for name, (features, compression) in TABLES.items()
        ],
        is_weighted=kind == "weighted",
    )
    apply_optimizer_in_backward(torch.optim.SGD, ebc.parameters(), {"lr": 0.1})
    return Model(ebc)


def sharded(kind: str) -> tuple[DistributedModelParallel, Model]:
    """The model under DistributedModelParallel, and one beside it with its weights."""
    model, beside = made(kind), made(kind)
    ways = {name: row_wise() if name == "md" else table_wise(rank=0) for name in TABLES}
    plan = construct_module_sharding_plan(
        model.ebc,
        ways,
        sharder=EmbeddingBagCollectionSharder(),
        local_size=1,
        world_size=1,
        device_type="cpu",
    )
    state = {key: value.clone() for key, value in beside.state_dict().items()}
    whole = DistributedModelParallel(
        model, device=torch.device("cpu"), plan=ShardingPlan({"ebc": plan}), sharders=get_sharders()
    )
    whole.load_state_dict(state)
    return whole, beside


def batch(keys: Sequence[str], kind: str, step: int) -> KeyedJaggedTensor:
    generator = torch.Generator().manual_seed(step)
    if kind != "variable":
        lengths = torch.randint(0, 4, (len(keys) * SIZE,), generator=generator)
        sizes: dict[str, Any] = {}
    else:
        strides = torch.randint(1, SIZE, (len(keys),), generator=generator).tolist()
        lengths = torch.randint(0, 4, (sum(strides),), generator=generator)
        # In an order of their own.
        names = keys if step % 3 else list(reversed(keys))
        rows = [torch.randint(0, strides[keys.index(name)], (SIZE,), generator=generator) for name in names]
        sizes = {
            "stride_per_key_per_rank": [[size] for size in strides],
            "inverse_indices": (list(names), torch.stack(rows)),
        }
    count = int(lengths.sum())
    weights = torch.rand(count, generator=generator) if kind == "weighted" else None
    ids = torch.randint(0, ROWS, (count,), generator=generator)
    return KeyedJaggedTensor(list(keys), ids, weights=weights, lengths=lengths, **sizes)


@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize("kind", ["plain", "mean", "weighted", "variable"])
def test_keys_may_change_from_batch_to_batch(kind: str, first: int) -> None:
    model, beside = sharded(kind)
    for step, keys in enumerate(KEYS[first:] + KEYS[:first]):
        features = batch(keys, kind, step)
        own, wanted = model(features), beside(features)
        for name in wanted.keys():  # noqa: SIM118 - a KeyedTensor
            assert torch.allclose(own[name], wanted[name], atol=1e-6), (step, name)
        for pooled in (own, wanted):
            sum(pooled[name].square().sum() for name in wanted.keys()).backward()  # noqa: SIM118
        state = model.module.ebc._backends()
        for name, table in state.items():
            assert torch.allclose(table.to_dense(), beside.ebc.to_dense(name), atol=1e-6), (step, name)


def test_a_tensordict_may_have_its_entries_in_another_order() -> None:
    tensordict = pytest.importorskip("tensordict")
    model, beside = sharded("plain")
    for keys in (["f0", "f1", "f2", "f3"], ["f3", "f1", "f0", "f2"], ["f1", "f0", "f2", "f3"]):
        bags = {key: [torch.tensor([k, 7 * k + 1]), torch.tensor([k + 20])] for k, key in enumerate(keys)}
        entries = {key: torch.nested.nested_tensor(bag, layout=torch.jagged) for key, bag in bags.items()}
        features = tensordict.TensorDict(entries, batch_size=[2])
        own, wanted = model(features), beside(features)
        for name in wanted.keys():  # noqa: SIM118 - a KeyedTensor
            assert torch.allclose(own[name], wanted[name], atol=1e-6), (keys, name)


def test_a_feature_that_goes_missing_later_is_named() -> None:
    model, _ = sharded("plain")
    model(batch(KEYS[0], "plain", 0))
    with pytest.raises(BatchError, match=r"'f3' of table 'md' is missing from .*\['f0', 'f1', 'f2'\]"):
        model(batch(["f0", "f1", "f2"], "plain", 1))
