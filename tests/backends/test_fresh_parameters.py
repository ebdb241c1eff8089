"""Law 6: a fresh table's elements have mean 0 and the deviation asked for, whatever the method."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recemb.spec import (
    ROBE,
    Compression,
    Dense,
    MixedDimension,
    QuotientRemainder,
    TableSpec,
    TensorTrain,
)
from tests.backends.cases import CASES, Case, build_tables, table


def every_row(spec: TableSpec) -> Tensor:
    """[prod(p), D]: all rows of a fresh tensor train, those beyond N too."""
    backend = build_tables([spec]).backend(spec.name)
    heights = [core.shape[0] for core in backend.own_parameters().values()]
    digits = torch.cartesian_prod(*[torch.arange(height) for height in heights])
    with torch.no_grad():
        return backend.rows(digits.view(math.prod(heights), len(heights))).double()


@given(
    st.integers(1, 3000),
    st.sampled_from([1, 4, 7, 8, 16]),
    st.integers(2, 5),
    st.integers(1, 9),
    st.integers(0, 9),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_tensor_train_scale_is_exact_for_any_rank_and_order(
    rows: int, dim: int, order: int, rank: int, seed: int
) -> None:
    torch.manual_seed(seed)
    spec = table(rows, dim, TensorTrain(rank=rank, num_cores=order), init_std=None)
    realised = float(every_row(spec).square().mean().sqrt())
    assert realised == pytest.approx(math.sqrt(1 / (3 * rows)), rel=1e-4)


@pytest.mark.parametrize("rank", [(1, 8), (8, 1), (3, 17)])
@pytest.mark.parametrize("std", [1e-4, 1.0, 30.0])
def test_tensor_train_scale_with_unequal_ranks(rank: tuple[int, int], std: float) -> None:
    rows = every_row(table(500, 8, TensorTrain(rank=rank), init_std=std))
    assert float(rows.square().mean().sqrt()) == pytest.approx(std, rel=1e-4)


def test_tensor_train_scale_in_half_precision() -> None:
    spec = replace(table(5000, 16, TensorTrain(rank=8), init_std=None), dtype="bfloat16")
    assert float(every_row(spec).square().mean().sqrt()) == pytest.approx(math.sqrt(1 / 15000), rel=0.02)


SIGNED = ROBE(compress_rate=8, block_size=4, use_sign=True)
TRAINS = [TensorTrain(rank=3, num_cores=2), TensorTrain(rank=3, num_cores=5)]
METHODS: list[tuple[str, Compression]] = [
    ("dense", Dense()),
    ("tt", TensorTrain(rank=4)),
    ("qr-mult", QuotientRemainder(collisions=10)),
    ("qr-add", QuotientRemainder(collisions=10, operation="add")),
    ("qr-concat", QuotientRemainder(collisions=10, operation="concat")),
    ("robe", ROBE(compress_rate=8, block_size=4)),
    ("robe-sign", SIGNED),
    ("md", MixedDimension(dim=4)),
    ("md-1", MixedDimension(dim=1)),
]


@pytest.mark.parametrize("init_std", [None, 0.3])
@pytest.mark.parametrize("compression", [m for _, m in METHODS], ids=[name for name, _ in METHODS])
def test_mean_and_deviation_over_seeds(compression: Compression, init_std: float | None) -> None:
    """Each seed gives one mean and one mean square; their averages lie within 5 standard errors."""
    spec = table(400, 8, compression, init_std=init_std)
    backend = build_tables([spec]).backend("t")
    means, squares = [], []
    for seed in range(250):
        torch.manual_seed(seed)
        backend.reset_parameters()
        dense = backend.to_dense().double()
        means.append(float(dense.mean()))
        squares.append(float(dense.square().mean()))
    wanted = math.sqrt(1 / 1200) if init_std is None else init_std
    mean, square = torch.tensor(means).double(), torch.tensor(squares).double()
    mean_error, square_error = float(mean.std() / 250**0.5), float(square.std() / 250**0.5)
    assert abs(float(mean.mean())) <= 5 * mean_error + 1e-12
    # The rows of a train are scaled exactly over prod(p) rows, of which N are looked at: hence the 1 %.
    assert abs(float(square.mean()) - wanted**2) <= 5 * square_error + 0.01 * wanted**2
    assert mean_error < 0.05 * wanted
    assert square_error < 0.05 * wanted**2


def test_robe_array_serves_tables_of_different_scales_by_their_mean_variance() -> None:
    compression = ROBE(compress_rate=4, block_size=4)
    tables = [
        table(4000, 8, compression, name="large", init_std=0.1),
        table(1000, 16, compression, name="small", init_std=0.4),
    ]
    array = build_tables(tables).backend("large").own_parameters()["array"]
    variance = (32_000 * 0.1**2 + 16_000 * 0.4**2) / 48_000
    assert float(array.detach().double().square().mean()) == pytest.approx(variance, rel=0.05)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_seed_decides_the_parameters(case: Case) -> None:
    built = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        built.append(torch.cat([p.detach().flatten() for p in build_tables(case.tables).parameters()]))
    assert torch.equal(built[0], built[1])
    assert not torch.equal(built[0], built[2])


def test_zero_std_gives_zero_rows() -> None:
    for _, compression in METHODS:
        dense = build_tables([table(50, 8, compression, init_std=0.0)]).backend("t").to_dense()
        assert not dense.any()


@pytest.mark.parametrize("compression", [*(m for _, m in METHODS), *TRAINS], ids=str)
def test_zero_rows_learn(compression: Compression) -> None:
    backend = build_tables([table(50, 8, compression, init_std=0.0)]).backend("t")
    optimizer = torch.optim.Adam(backend.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        rows = backend.rows(backend.map_ids(torch.arange(50)))
        loss = (rows - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == 1
    # Blocks of either sign that share their weights come no closer than 0.9 to rows of 1.
    assert losses[-1] < (0.95 if compression == SIGNED else 0.2)
    assert all(bool(parameter.grad.any()) for parameter in backend.parameters() if parameter.grad is not None)
