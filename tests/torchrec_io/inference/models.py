"""A collection of every method, and batches for it, that the tests of this folder share."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor, PoolingType

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

DIM, ROWS = 8, 90
_ROBE = ROBE(compress_rate=4, block_size=8, use_sign=True)
COMPRESSIONS: tuple[Compression, ...] = (
    TensorTrain(rank=8),
    Dense(),
    QuotientRemainder(collisions=9),
    MixedDimension(dim=6),
    _ROBE,
    Dense(),
    replace(_ROBE, cache=HotRows(rows=9)),
    TensorTrain(rank=8, cache=HotRows(rows=9)),
)
# Not the order of the tables, with one that is nobody's, and one of two tables.
KEYS = ["shared", *(f"f{k}" for k in reversed(range(len(COMPRESSIONS)))), "nobody's"]


def collection(
    weighted: bool = False, compressions: tuple[Compression, ...] = COMPRESSIONS
) -> EmbeddingBagCollection:
    """A trained collection, sums and means in turn, with some rows cached."""
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(
            name=f"t{k}",
            num_embeddings=ROWS + k,
            embedding_dim=DIM,
            feature_names=[f"f{k}", "shared"] if k in (0, 1) else [f"f{k}"],
            pooling=PoolingType.MEAN if k % 2 and not weighted else PoolingType.SUM,
            weight_init_min=-0.5,
            weight_init_max=0.5,
            compression=compression,
        )
        for k, compression in enumerate(compressions)
    ]
    made = EmbeddingBagCollection(tables=tables, is_weighted=weighted)
    for cache in made.hot_row_caches().values():
        cache.ids[:6] = torch.randperm(ROWS)[:6]
        cache.weight.data.normal_()
    return made


def request(size: int, weighted: bool = False, most: int = 4, seed: int = 1) -> tuple[Tensor, ...]:
    """Ids, lengths [F, B] and weights, if any, of a batch; bags hold fewer than ``most`` ids."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, most, (len(KEYS), size), generator=generator)
    ids = torch.randint(0, ROWS, (int(lengths.sum()),), generator=generator)
    return (ids, lengths, torch.rand(ids.numel(), generator=generator)) if weighted else (ids, lengths)


def batch(*tensors: Tensor) -> KeyedJaggedTensor:
    """The batch of a request."""
    ids, lengths, *weights = tensors
    return KeyedJaggedTensor(
        keys=KEYS, values=ids, lengths=lengths.flatten(), weights=weights[0] if weights else None
    )


class Served(nn.Module):
    """Tensors in, pooled rows out: what is exported."""

    def __init__(self, ebc: nn.Module) -> None:
        super().__init__()
        self.ebc = ebc

    def forward(self, ids: Tensor, lengths: Tensor, weights: Tensor | None = None) -> Tensor:
        given = (ids, lengths) if weights is None else (ids, lengths, weights)
        pooled: Tensor = self.ebc(batch(*given)).values()
        return pooled
