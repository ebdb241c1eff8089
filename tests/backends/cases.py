"""The table of cases that the contract laws run over, and plain-Python readings of a lookup.

Every backend of :data:`recemb.backends.BACKENDS` enters at least one line (``test_contract.py`` checks it).
A case is the list of tables that share one storage: one table for most methods, a group for ROBE.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recemb.backends import build
from recemb.backends.base import Backend
from recemb.bags import Bags
from recemb.spec import (
    ROBE,
    Compression,
    Dense,
    MixedDimension,
    Pooling,
    QuotientRemainder,
    TableSpec,
    TensorTrain,
)


@dataclass(frozen=True)
class Case:
    """Tables that share one storage, under a name for the test id."""

    id: str
    tables: tuple[TableSpec, ...]


def table(
    num_embeddings: int,
    embedding_dim: int,
    compression: Compression,
    *,
    name: str = "t",
    pooling: Pooling = "sum",
    init_std: float | None = 0.5,
) -> TableSpec:
    """A table whose fresh rows are of order 1/2, so that an absolute tolerance means something."""
    return TableSpec(
        name=name,
        num_embeddings=num_embeddings,
        embedding_dim=embedding_dim,
        pooling=pooling,
        compression=compression,
        init_std=init_std,
    )


def _one(case_id: str, rows: int, dim: int, compression: Compression, pooling: Pooling = "sum") -> Case:
    return Case(case_id, (table(rows, dim, compression, pooling=pooling),))


def _robe_group(case_id: str, compression: ROBE) -> Case:
    return Case(
        case_id,
        (
            table(50, 8, compression, name="wide"),
            table(31, 5, compression, name="odd", pooling="mean"),
            table(7, 1, compression, name="narrow"),
        ),
    )


CASES: tuple[Case, ...] = (
    _one("dense", 40, 8, Dense()),
    _one("dense-mean", 40, 8, Dense(), "mean"),
    _one("dense-1x1", 1, 1, Dense()),
    _one("tt-2-cores", 40, 8, TensorTrain(rank=3, num_cores=2)),
    _one("tt-3-cores", 60, 8, TensorTrain(rank=4)),
    _one("tt-3-cores-mean", 60, 8, TensorTrain(rank=4), "mean"),
    _one("tt-4-cores", 100, 16, TensorTrain(rank=2, num_cores=4)),
    _one("tt-5-cores", 70, 4, TensorTrain(rank=2, num_cores=5)),
    _one("tt-rank-1", 60, 8, TensorTrain(rank=1)),
    _one("tt-unequal-ranks", 60, 8, TensorTrain(rank=(2, 5))),
    _one("tt-unequal-ranks-4", 100, 16, TensorTrain(rank=(5, 1, 3), num_cores=4)),
    _one("tt-explicit-shapes", 50, 12, TensorTrain(rank=3, row_shape=(4, 3, 5), dim_shape=(3, 1, 4))),
    _one("tt-exact-rows", 24, 6, TensorTrain(rank=2, row_shape=(2, 3, 4), dim_shape=(1, 2, 3))),
    _one("tt-rank-beyond-use", 12, 4, TensorTrain(rank=20)),
    _one("tt-prime-dim", 40, 7, TensorTrain(rank=3)),
    _one("tt-dim-1", 40, 1, TensorTrain(rank=3)),
    _one("tt-1-row", 1, 8, TensorTrain(rank=3)),
    _one("tt-prime-rows", 97, 8, TensorTrain(rank=3)),
    _one("qr-mult", 48, 8, QuotientRemainder(collisions=4)),
    _one("qr-mult-mean", 48, 8, QuotientRemainder(collisions=4), "mean"),
    _one("qr-add", 48, 8, QuotientRemainder(collisions=4, operation="add")),
    _one("qr-concat", 48, 8, QuotientRemainder(collisions=4, operation="concat")),
    _one("qr-concat-odd-dim", 48, 7, QuotientRemainder(collisions=5, operation="concat")),
    _one("qr-1-collision", 23, 4, QuotientRemainder(collisions=1)),
    _one("qr-all-collide", 23, 4, QuotientRemainder(collisions=23, operation="add")),
    _one("qr-uneven", 47, 8, QuotientRemainder(collisions=10, operation="mult")),
    _one("qr-1-row", 1, 2, QuotientRemainder(collisions=1, operation="concat")),
    _one("qr-dim-1", 30, 1, QuotientRemainder(collisions=6, operation="add")),
    _one("robe-block-1", 40, 8, ROBE(compress_rate=4, block_size=1)),
    _one("robe-block-dim", 40, 8, ROBE(compress_rate=4, block_size=8)),
    _one("robe-block-dim-mean", 40, 8, ROBE(compress_rate=4, block_size=8), "mean"),
    _one("robe-block-beyond-dim", 40, 6, ROBE(compress_rate=4, block_size=10)),
    _one("robe-block-uneven", 40, 8, ROBE(compress_rate=4, block_size=3)),
    _one("robe-sign", 40, 8, ROBE(compress_rate=4, block_size=3, use_sign=True)),
    _one("robe-wraps-always", 60, 8, ROBE(compress_rate=60, block_size=8, use_sign=True)),
    _one("robe-seed", 40, 8, ROBE(compress_rate=4, block_size=4, seed=2**62)),
    _robe_group("robe-group", ROBE(compress_rate=5, block_size=4)),
    _robe_group("robe-group-sign", ROBE(compress_rate=5, block_size=4, use_sign=True)),
    _one("md", 40, 8, MixedDimension(dim=3)),
    _one("md-mean", 40, 8, MixedDimension(dim=3), "mean"),
    _one("md-dim-1", 40, 8, MixedDimension(dim=1)),
    _one("md-full-dim", 40, 8, MixedDimension(dim=8)),
    _one("md-1x1", 1, 1, MixedDimension(dim=1)),
)


class Tables(nn.ModuleDict):
    """Built backends by table name, so that ``.double()`` and ``state_dict`` act on all of them."""

    def backend(self, name: str) -> Backend:
        """The backend of one table."""
        module = self[name]
        assert isinstance(module, Backend)
        return module

    def backends(self) -> list[Backend]:
        """In the order of the tables."""
        return [self.backend(name) for name in self]

    def reset(self) -> None:
        """Fresh parameters for every table."""
        for backend in self.backends():
            backend.reset_parameters()


def build_tables(tables: Sequence[TableSpec], device: str = "cpu") -> Tables:
    """Build and, unless on meta, initialise."""
    built = Tables(build(tables, torch.device(device)))
    if device != "meta":
        built.reset()
    return built


def some_ids(spec: TableSpec, count: int, seed: int) -> list[int]:
    """Ids with both ends of the table among them, and with repeats."""
    draw = random.Random(f"{spec.name}/{seed}")
    ids = [0, spec.num_embeddings - 1]
    while len(ids) < count:
        ids.append(draw.choice(ids) if draw.random() < 0.3 else draw.randrange(spec.num_embeddings))
    draw.shuffle(ids)
    return ids[:count]


def make_bags(tables: Sequence[TableSpec], batch_size: int, *, weighted: bool, seed: int = 0) -> Bags:
    """Bags of 0 to 5 ids with repeats inside a bag; the first and the last sample of a feature are empty."""
    draw = random.Random(seed)
    ids: list[int] = []
    lengths: list[int] = []
    for spec in tables:
        for sample in range(batch_size):
            length = 0 if sample in (0, batch_size - 1) else draw.choice((0, 1, 2, 3, 5))
            bag = some_ids(spec, length, draw.randrange(10**6)) if length else []
            if length >= 3:
                bag[-1] = bag[0]
            ids.extend(bag)
            lengths.append(length)
    return bags_of(ids, lengths, len(tables), [draw.uniform(-2, 2) for _ in ids] if weighted else None)


def bags_of(
    ids: Sequence[int], lengths: Sequence[int], num_features: int, weights: Sequence[float] | None = None
) -> Bags:
    """Bags from Python lists; lengths are feature by feature."""
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    return Bags(
        ids=torch.tensor(ids, dtype=torch.int64),
        offsets=torch.tensor(offsets, dtype=torch.int64),
        num_features=num_features,
        weights=None if weights is None else torch.tensor(weights, dtype=torch.float64),
    )


def naive_pooled(backends: Sequence[Backend], bags: Bags) -> Tensor:
    """[B, sum of D]: one id at a time, one bag at a time, in the dtype of the parameters."""
    offsets = bags.offsets.tolist()
    size = bags.batch_size
    columns = []
    for f, backend in enumerate(backends):
        samples = []
        parameter = next(iter(backend.own_parameters().values()))
        for sample in range(size):
            begin, end = offsets[f * size + sample], offsets[f * size + sample + 1]
            total = torch.zeros(backend.table.embedding_dim, dtype=parameter.dtype)
            for position in range(begin, end):
                row = backend.rows(backend.map_ids(bags.ids[position : position + 1]))[0]
                if bags.weights is not None:
                    row = row * bags.weights[position].to(row.dtype)
                total = total + row
            if backend.table.pooling == "mean" and end > begin:
                total = total / (end - begin)
            samples.append(total)
        columns.append(
            torch.stack(samples) if samples else parameter.new_zeros(0, backend.table.embedding_dim)
        )
    return torch.cat(columns, dim=1)


def gradients(output: Tensor, inputs: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Gradients of a fixed random projection of ``output``; zeros for what it does not depend on."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    found = torch.autograd.grad((output * direction).sum(), list(inputs), allow_unused=True)
    return [
        torch.zeros_like(value) if grad is None else grad for value, grad in zip(inputs, found, strict=True)
    ]
