"""With a cache of all rows training equals that of an uncompressed table, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchrec
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import KeyedJaggedTensor, PoolingType

from recemb import Compression, Dense, EmbeddingBagCollection, EmbeddingBagConfig, HotRows
from tests.cache.cases import METHODS

SIZES = {"a": 300, "b": 70}
BATCH, STEPS = 40, 9
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.5}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05, "initial_accumulator_value": 0.1}),
    "rowwise_adagrad": (torchrec.optim.RowWiseAdagrad, {"lr": 0.05}),
    "adam": (torch.optim.Adam, {"lr": 0.02}),
}


def collection(compression: Compression, pooling: PoolingType) -> EmbeddingBagCollection:
    torch.manual_seed(0)
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name,
                num_embeddings=rows,
                embedding_dim=8,
                feature_names=[name] if name == "a" else ["b", "c"],
                pooling=pooling,
                weight_init_min=-1.0,
                weight_init_max=1.0,
                compression=compression,
            )
            for name, rows in SIZES.items()
        ]
    )


def batches() -> list[KeyedJaggedTensor]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(STEPS):
        lengths = torch.randint(0, 5, (3 * BATCH,), generator=generator)
        parts = [
            torch.randint(0, rows, (int(part.sum()),), generator=generator)
            for rows, part in zip((300, 70, 70), lengths.split(BATCH), strict=True)
        ]
        found.append(KeyedJaggedTensor(keys=["a", "b", "c"], values=torch.cat(parts), lengths=lengths))
    return found


def train(model: EmbeddingBagCollection, name: str, fused: bool) -> list[Tensor]:
    kind, settings = OPTIMIZERS[name]
    optimizer = None
    if fused:
        apply_optimizer_in_backward(kind, model.parameters(), dict(settings))
    else:
        optimizer = kind(model.parameters(), **settings)
    pooled = []
    for batch in batches():
        values = model(batch).values()
        pooled.append(values.detach().clone())
        loss = (values - torch.linspace(-1, 1, values.shape[1])).square().mean()
        if optimizer is not None:
            optimizer.zero_grad()
        loss.backward()
        if optimizer is not None:
            optimizer.step()
    return pooled


@pytest.mark.parametrize("method", ["tt", "mult", "md"])
@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN], ids=["sum", "mean"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_cache_of_all_rows_is_the_dense_table(
    name: str, fused: bool, pooling: PoolingType, method: str
) -> None:
    cache = HotRows(fraction=1.0, warmup=0, refresh_every=2)
    cached = collection(METHODS[method](cache), pooling)
    dense = collection(Dense(), pooling)
    for table in SIZES:
        dense.from_dense(table, cached.to_dense(table))
    start = dense.to_dense("a")
    for ours, plain in zip(train(cached, name, fused), train(dense, name, fused), strict=True):
        assert torch.equal(ours, plain)
    for table in SIZES:
        assert torch.equal(cached.to_dense(table), dense.to_dense(table))
        assert cached.hot_row_caches()[table].ids.tolist() == list(range(SIZES[table]))
    assert not torch.equal(start, dense.to_dense("a"))
    assert all(figures.hit_rate == 1.0 for figures in cached.cache_metrics().values())
