"""Steps in the backward: what is read of a parameter before it moves, in any number of threads, at any id."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torchrec
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

from recemb.backends import build
from recemb.backends.base import Backend
from recemb.bags import Bags
from recemb.engine import Engine
from recemb.spec import ROBE, Compression, MixedDimension, QuotientRemainder, TableSpec, TensorTrain
from tests.kernels.cases import METHODS, make_bags, make_engine

OPTIMIZERS = [torch.optim.SGD, torch.optim.Adagrad, torchrec.optim.RowWiseAdagrad, torch.optim.Adam]


def state_of(tables: dict[str, Backend]) -> list[Tensor]:
    """Weights, and what their optimizers keep."""
    parameters = [p for table in tables.values() for p in table.parameters()]
    states = [p._in_backward_optimizers[0].state[p] for p in parameters]  # type: ignore[attr-defined]
    return [*(p.detach().clone() for p in parameters), *(x.clone() for s in states for x in s.values())]


@pytest.mark.parametrize("longest", [1, 4])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weights_have_the_gradient_of_rows_that_have_not_moved(kind: type, longest: int) -> None:
    """The bits of a look-up whose tables are not stepped, which torch does of uncompressed ones."""
    engine, tables = make_engine()
    bags = make_bags(engine, 300, longest, seed=1)
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(bags.ids.numel(), generator=generator)
    grad = torch.randn(300, 16 * len(METHODS), generator=generator)
    found = []
    for stepped in (False, True):
        if stepped:
            for table in tables.values():
                apply_optimizer_in_backward(kind, table.parameters(), {"lr": 0.5})
        own = weights.clone().requires_grad_()
        before = [p.detach().clone() for table in tables.values() for p in table.parameters()]
        engine(tables, replace(bags, weights=own)).backward(grad)
        after = [p.detach() for table in tables.values() for p in table.parameters()]
        assert all(torch.equal(a, b) != stepped for a, b in zip(before, after, strict=True))
        found.append(own.grad)
    expected, own = found
    assert expected is not None
    assert own is not None
    assert expected.abs().max() > 1
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
    for f, target in enumerate(engine.targets):
        place = slice(int(bags.offsets[300 * f]), int(bags.offsets[300 * (f + 1)]))
        assert target.table == "dense" or torch.equal(own[place], expected[place])


@pytest.mark.parametrize("rank", [8, 32])
def test_weights_have_that_gradient_where_all_threads_take_one_table(
    rank: int, set_threads: Callable[[int], None]
) -> None:
    """Many tables are one thread's each."""
    spec = TableSpec(
        name="t",
        num_embeddings=20_000,
        embedding_dim=16,
        feature_names=("t",),
        compression=TensorTrain(rank=rank),
    )
    batch = 4000
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20_000, (batch,), generator=generator)
    weights, grad = torch.rand(batch, generator=generator), torch.randn(batch, 16, generator=generator)
    found = []
    set_threads(3)
    for lr in (0.0, *(1e3,) * 4):
        torch.manual_seed(0)
        tables = build([spec], torch.device("cpu"))
        tables["t"].reset_parameters()
        apply_optimizer_in_backward(torch.optim.SGD, tables["t"].parameters(), {"lr": lr})
        own = weights.clone().requires_grad_()
        Engine([spec])(tables, Bags(ids, torch.arange(batch + 1), 1, own)).backward(grad)
        found.append(own.grad)
    for other in found[1:]:
        assert other is not None
        assert found[0] is not None
        assert torch.equal(other, found[0])


@pytest.mark.parametrize("longest", [1, 5])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_have_the_same_bits_in_any_number_of_threads(
    kind: type, longest: int, set_threads: Callable[[int], None]
) -> None:
    outcomes = []
    for count in (1, 2, 3, 2):
        set_threads(count)
        engine, tables = make_engine()
        for table in tables.values():
            apply_optimizer_in_backward(kind, table.parameters(), {"lr": 0.1})
        for seed in range(2):
            pooled = engine(tables, make_bags(engine, 500, longest, seed))
            pooled.backward(torch.randn(pooled.shape, generator=torch.Generator().manual_seed(seed)))
        outcomes.append(state_of(tables))
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


@pytest.mark.parametrize(
    "compression",
    [
        TensorTrain(rank=4),
        QuotientRemainder(collisions=2**17),
        ROBE(compress_rate=10**6, block_size=16),
    ],
    ids=lambda compression: compression.method,
)
def test_f14_steps_at_ids_beyond_32_bits(compression: Compression) -> None:
    spec = TableSpec(
        name="t", num_embeddings=2**33 + 2, embedding_dim=16, compression=compression, init_std=1.0
    )
    ours, torchs = (build([spec], torch.device("cpu"))["t"] for _ in range(2))
    ours.reset_parameters()
    torchs.load_state_dict(ours.state_dict())
    apply_optimizer_in_backward(torch.optim.SGD, ours.parameters(), {"lr": 0.1})
    plain = torch.optim.SGD(torchs.parameters(), lr=0.1)
    ids = torch.tensor([0, 2**31 - 1, 2**31, 2**31 + 1, 2**33 - 1, 2**33, 2**33 + 1, 2**33])
    before = [p.detach().clone() for p in ours.parameters()]
    ours.pooled([ours], Bags(ids, torch.arange(0, 9, 2), 1)).square().sum().backward()
    torchs.rows(torchs.map_ids(ids)).view(4, 2, 16).sum(1).square().sum().backward()
    plain.step()
    for mine, theirs, old in zip(ours.parameters(), torchs.parameters(), before, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        assert not torch.equal(mine, old)


def test_projections_step_with_their_rows() -> None:
    """Under weights that are 0 nothing moves, whatever the id."""
    spec = TableSpec(name="t", num_embeddings=50, embedding_dim=8, compression=MixedDimension(dim=3))
    table = build([spec], torch.device("cpu"))["t"]
    table.reset_parameters()
    apply_optimizer_in_backward(torch.optim.Adagrad, table.parameters(), {"lr": 0.1})
    before = [p.detach().clone() for p in table.parameters()]
    bags = Bags(torch.tensor([1, 49]), torch.tensor([0, 1, 2]), 1, torch.zeros(2))
    table.pooled([table], bags).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, table.parameters(), strict=True))
