"""Tables of every method and trains of every order, shared by the tests of the eager look-up."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

from recemb.backends import build
from recemb.backends.base import Backend
from recemb.bags import Bags
from recemb.engine import Engine
from recemb.spec import ROBE, Compression, Dense, MixedDimension, QuotientRemainder, TableSpec, TensorTrain
from recemb_kernels.digit_tree.group import Batch, FeatureCode, Group, TableKernel
from recemb_kernels.digit_tree.step import step_module
from recemb_kernels.tt_gather import TrainShape, tt_gather

METHODS: dict[str, tuple[int, Compression]] = {
    "tt": (3000, TensorTrain(rank=8)),
    "dense": (500, Dense()),
    "robe": (2000, ROBE(compress_rate=20, block_size=16)),
    "qr": (1000, QuotientRemainder(collisions=30)),
    "md": (900, MixedDimension(dim=3)),
    "wide_tt": (700, TensorTrain(rank=5, num_cores=2)),
}
SHAPES = {
    "three": TrainShape((9, 8, 7), (2, 2, 4), (1, 16, 8, 1)),
    "odd": TrainShape((9, 8, 7), (3, 1, 2), (1, 13, 5, 1)),
    # Whole vectors of the last core's columns: one, and three of each of eight and more rows.
    "columns": TrainShape((9, 8, 7), (1, 1, 16), (1, 16, 13, 1)),
    "wide": TrainShape((5, 3, 6), (9, 1, 48), (1, 11, 9, 1)),
    "two": TrainShape((21, 24), (2, 4), (1, 8, 1)),
    "four": TrainShape((5, 4, 5, 6), (2, 1, 3, 2), (1, 8, 16, 3, 1)),
}


def make_engine(dims: int = 16, methods: Sequence[str] = tuple(METHODS)) -> tuple[Engine, dict[str, Backend]]:
    torch.manual_seed(0)
    specs = [
        TableSpec(
            name=name,
            num_embeddings=rows,
            embedding_dim=dims,
            compression=compression,
            feature_names=(name,),
            pooling="mean" if name in ("qr", "tt") else "sum",
            init_std=0.5,
        )
        for name, (rows, compression) in METHODS.items()
        if name in methods
    ]
    tables = build(specs, torch.device("cpu"))
    for table in tables.values():
        table.reset_parameters()
    return Engine(specs), tables


def make_bags(engine: Engine, batch: int, longest: int, seed: int) -> Bags:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (len(engine.targets) * batch,), generator=generator)
    if longest == 1:
        lengths.fill_(1)
    ids = [
        (torch.rand(int(part.sum()), generator=generator) ** 2 * target.num_embeddings).long()
        for target, part in zip(engine.targets, lengths.split(batch), strict=True)
    ]
    return Bags(torch.cat(ids), torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), len(engine.targets))


def group_of(tables: dict[str, Backend]) -> Group:
    """What has looked up batches of all these tables together."""
    prepared = next(
        made for made in next(iter(tables.values())).memo.values() if len(made.tables) == len(tables)
    )
    (group,) = prepared.lookup._groups.values()
    return group


def step_or_skip() -> Any:
    """The compiled module of look-ups that train, which must compile where there are headers of Python."""
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        pytest.skip("look-ups train from Python where there is no Python.h")
    return step_module()


def plain(engine: Engine, tables: dict[str, Backend], bags: Bags) -> Tensor:
    pooled = [
        type(tables[target.table]).pooled_plain([tables[target.table]], bags.feature(f))
        for f, target in enumerate(engine.targets)
    ]
    return torch.cat(pooled, dim=1)


def make_kernels(mirrored: bool) -> Iterator[tuple[TrainShape, TableKernel]]:
    for shape in SHAPES.values():
        kernel = tt_gather.kernel(shape)
        # A mirror that costs nothing is always taken, one that costs all the world never.
        cost = 1e-9 if mirrored else 1e9
        yield shape, replace(kernel, mirrored_cost=(cost,) * len(kernel.cost))


def run_trains(
    kernels: Sequence[TableKernel],
    cores: Sequence[Tensor],
    batch: Batch,
    grad: Tensor | None,
    micro_batch_rows: int = 2**18,
) -> list[Tensor]:
    group = Group(kernels, [FeatureCode(t, t == 1) for t in range(len(kernels))], micro_batch_rows)
    out, state = group.forward(cores, batch, keep=True)
    upstream = torch.ones_like(out) if grad is None else grad
    grads, weights = group.backward(
        upstream,
        cores,
        batch,
        state,
        updates=[None] * len(kernels),
        wanted=[True] * len(cores),
        want_weights=batch.weights is not None,
    )
    return [out, *(g for g in (*grads, weights) if g is not None)]


def train_batch(batch: int, longest: int, weighted: bool, seed: int) -> tuple[list[Tensor], Batch, Tensor]:
    torch.manual_seed(seed)
    cores = [
        torch.randn(p, r * q * s)
        for shape in SHAPES.values()
        for p, q, r, s in zip(shape.row_shape, shape.dim_shape, shape.ranks, shape.ranks[1:], strict=False)
    ]
    lengths = torch.randint(int(longest == 1), longest + 1, (len(SHAPES) * batch,))
    ids = torch.cat(
        [
            torch.randint(0, math.prod(shape.row_shape), (int(part.sum()),))
            for shape, part in zip(SHAPES.values(), lengths.split(batch), strict=True)
        ]
    )
    weights = torch.rand(ids.numel()) if weighted else None
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    columns = sum(math.prod(shape.dim_shape) for shape in SHAPES.values())
    return cores, Batch(ids, offsets, weights, batch), torch.randn(batch, columns)


def step_all(tables: dict[str, Backend], kind: type[torch.optim.Optimizer], lr: float) -> None:
    for table in tables.values():
        apply_optimizer_in_backward(kind, table.parameters(), {"lr": lr})


def settings_of(parameter: nn.Parameter) -> dict[str, Any]:
    """Of the optimizer that is attached to it."""
    settings: dict[str, Any] = parameter._in_backward_optimizers[0].param_groups[0]
    return settings
