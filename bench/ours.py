"""recemb's tables as cases: ready ids through the engine, or a KeyedJaggedTensor through the module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torchrec
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import KeyedJaggedTensor

import recemb
from bench.ids import Batch
from bench.peers import LEARNING_RATE, Step, feature_names
from bench.settings import (
    AT_HAND,
    AT_HAND_ROWS,
    DENSE,
    FORWARD,
    HASHING,
    LARGEST_TT,
    MD,
    MODULE,
    OP,
    QR,
    ROBE,
    TT,
)
from recemb import Compression, Dense, EmbeddingBagCollection, MixedDimension, QuotientRemainder, TensorTrain
from recemb.backends import storages
from recemb.bags import Bags
from recemb.engine import Engine
from recemb.spec import TableSpec
from recemb.torchrec_io.configs import to_configs

_OPTIMIZERS = {"rowwise_adagrad": torchrec.optim.RowWiseAdagrad, "sgd": torch.optim.SGD}
_HASH_FACTOR = 4
_LARGEST = 7


def compression_of(case: str, dim: int) -> Compression:
    """How a case stores a table of ``dim`` columns."""
    if case.startswith(TT):
        return TensorTrain(rank=int(case.removeprefix(TT)))
    return {
        ROBE: recemb.ROBE(compress_rate=1000, block_size=dim),
        QR: QuotientRemainder(collisions=4),
        MD: MixedDimension(dim=4),
        HASHING: Dense(),
        DENSE: Dense(),
        AT_HAND: Dense(),
    }[case]


def table_specs(case: str, rows: Sequence[int], dim: int) -> list[TableSpec]:
    """The tables of a case."""
    largest = set(sorted(range(len(rows)), key=lambda k: -rows[k])[:_LARGEST])
    specs = []
    for k, (name, n) in enumerate(zip(feature_names(len(rows)), rows, strict=True)):
        if case == LARGEST_TT:
            compression: Compression = TensorTrain(rank=32) if k in largest else Dense()
        else:
            compression = compression_of(case, dim)
        stored = {HASHING: max(1, n // _HASH_FACTOR), AT_HAND: min(n, AT_HAND_ROWS)}.get(case, n)
        specs.append(
            TableSpec(
                name=f"t_{name}",
                num_embeddings=stored,
                embedding_dim=dim,
                feature_names=(name,),
                compression=compression,
            )
        )
    return specs


def table_bytes(specs: Sequence[TableSpec]) -> int:
    """Bytes that the parameters of the tables take; builds nothing."""
    return 4 * sum(backend.num_params(peers) for backend, peers in storages(specs))


def build_collection(
    specs: Sequence[TableSpec], optimizer: str, learning_rate: float = LEARNING_RATE, device: str = "cpu"
) -> EmbeddingBagCollection:
    """The collection, its optimizer fused into the backward pass."""
    collection = EmbeddingBagCollection(tables=to_configs(specs), device=device)
    apply_optimizer_in_backward(_OPTIMIZERS[optimizer], collection.parameters(), {"lr": learning_rate})
    return collection


class OurTables:
    """One case of ours; ``steps`` as in :mod:`bench.peers`."""

    def __init__(self, case: str, rows: Sequence[int], dim: int, optimizer: str, device: str = "cpu") -> None:
        specs = table_specs(case, rows, dim)
        self.names = feature_names(len(rows))
        self.collection = build_collection(specs, optimizer, device=device)
        self.engine = Engine(specs)
        # Plain hashing: ids are taken mod the rows that there are, as part of the step.
        self.modulus = specs[0].num_embeddings if case == HASHING else None
        self.at_hand = case == AT_HAND
        self.steps: dict[str, Step] = {OP: self._op, MODULE: self._module, FORWARD: self._forward}

    def _ids(self, batch: Batch) -> Tensor:
        if self.at_hand:
            return batch.places
        return batch.ids if self.modulus is None else batch.ids % self.modulus

    def _pooled(self, batch: Batch) -> Tensor:
        bags = Bags(self._ids(batch), batch.offsets, len(self.names))
        return self.engine(self.collection.embedding_bags, bags)

    def _op(self, batch: Batch) -> None:
        self._pooled(batch).backward(batch.grad)

    def _module(self, batch: Batch) -> None:
        features = KeyedJaggedTensor(keys=self.names, values=self._ids(batch), lengths=batch.lengths)
        self.collection(features).values().backward(batch.grad)

    @torch.no_grad()
    def _forward(self, batch: Batch) -> None:
        self._pooled(batch)
