"""The eager look-up: all methods in one call, slices, mirrored trains, an optimizer a table, refusals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

from recemb.backends import build
from recemb.backends.base import Backend
from recemb.backends.native import pooled_native
from recemb.backends.tt_shapes import table_shapes
from recemb.bags import Bags, LookupTarget, check_bags
from recemb.engine import Engine
from recemb.errors import BatchError, NonFiniteError
from recemb.spec import ROBE, Compression, Dense, MixedDimension, QuotientRemainder, TableSpec, TensorTrain
from recemb_kernels import check
from recemb_kernels.digit_tree.group import Batch, FeatureCode, Group, TableKernel
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
    "two": TrainShape((21, 24), (2, 4), (1, 8, 1)),
    "four": TrainShape((5, 4, 5, 6), (2, 1, 3, 2), (1, 8, 16, 3, 1)),
}


def _engine(dims: int = 16) -> tuple[Engine, dict[str, Backend]]:
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
    ]
    tables = build(specs, torch.device("cpu"))
    for table in tables.values():
        table.reset_parameters()
    return Engine(specs), tables


def _bags(engine: Engine, batch: int, longest: int, seed: int) -> Bags:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (len(engine.targets) * batch,), generator=generator)
    if longest == 1:
        lengths.fill_(1)
    ids = [
        (torch.rand(int(part.sum()), generator=generator) ** 2 * target.num_embeddings).long()
        for target, part in zip(engine.targets, lengths.split(batch), strict=True)
    ]
    return Bags(torch.cat(ids), torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), len(engine.targets))


def _plain(engine: Engine, tables: dict[str, Backend], bags: Bags) -> Tensor:
    pooled = [
        type(tables[target.table]).pooled_plain([tables[target.table]], bags.feature(f))
        for f, target in enumerate(engine.targets)
    ]
    return torch.cat(pooled, dim=1)


@pytest.mark.parametrize("longest", [1, 4])
def test_tables_of_all_methods_go_through_one_call(longest: int) -> None:
    engine, tables = _engine()
    bags = _bags(engine, 37, longest, seed=1)
    with torch.no_grad():
        whole = pooled_native([tables[t.table] for t in engine.targets], bags)
        assert whole is not None
        torch.testing.assert_close(whole, _plain(engine, tables, bags), rtol=1e-5, atol=1e-6)
        # Each method alone, which is what torch.compile gets, gives the same bits.
        alone = [
            tables[t.table].pooled([tables[t.table]], bags.feature(f)) for f, t in enumerate(engine.targets)
        ]
    assert torch.equal(whole, torch.cat(alone, dim=1))


@pytest.mark.parametrize("longest", [1, 4])
def test_every_table_steps_with_its_own_optimizer(longest: int) -> None:
    engine, tables = _engine()
    _, twins = _engine()
    settings = {
        "tt": (torch.optim.SGD, {"lr": 0.3}),
        "dense": (torch.optim.Adagrad, {"lr": 0.1}),
        "robe": (torch.optim.SGD, {"lr": 0.05}),
        "qr": (torch.optim.Adagrad, {"lr": 0.2, "lr_decay": 0.5}),
        "md": (torch.optim.SGD, {"lr": 0.7}),
        # wide_tt has none: it gets gradients.
    }
    for name, (kind, arguments) in settings.items():
        apply_optimizer_in_backward(kind, tables[name].parameters(), dict(arguments))
    optimizers = [kind(twins[n].parameters(), **arguments) for n, (kind, arguments) in settings.items()]
    for step in range(4):
        bags = _bags(engine, 29, longest, seed=step)
        grad = torch.randn(29, 16 * len(METHODS), generator=torch.Generator().manual_seed(step))
        engine(tables, bags).backward(grad)
        _plain(engine, twins, bags).backward(grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name in METHODS:
        for ours, torchs in zip(tables[name].parameters(), twins[name].parameters(), strict=True):
            torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5)
            assert (ours.grad is None) == (name != "wide_tt")
            if name == "wide_tt":
                torch.testing.assert_close(ours.grad, torchs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_f13_a_gradient_that_is_not_finite_changes_nothing(value: float) -> None:
    engine, tables = _engine()
    for table in tables.values():
        apply_optimizer_in_backward(torch.optim.Adagrad, table.parameters(), {"lr": 0.1})
    parameters = [p for table in tables.values() for p in table.parameters()]
    states = [p._in_backward_optimizers[0].state[p] for p in parameters]
    before = [
        (p.detach().clone(), s["sum"].clone(), s["step"].clone())
        for p, s in zip(parameters, states, strict=True)
    ]
    pooled = engine(tables, _bags(engine, 9, 3, seed=0))
    grad = torch.zeros_like(pooled)
    grad[4, 40] = value
    with pytest.raises(NonFiniteError, match=r"tables tt, dense, robe.*none of their weights was changed"):
        pooled.backward(grad)
    for parameter, state, (weight, total, step) in zip(parameters, states, before, strict=True):
        assert torch.equal(parameter, weight)
        assert torch.equal(state["sum"], total)
        assert torch.equal(state["step"], step)


def _kernels(mirrored: bool) -> Iterator[tuple[TrainShape, TableKernel]]:
    for shape in SHAPES.values():
        kernel = tt_gather.kernel(shape)
        # A mirror that costs nothing is always taken, one that costs all the world never.
        cost = 1e-9 if mirrored else 1e9
        yield shape, replace(kernel, mirrored_cost=(cost,) * len(kernel.cost))


def _run(
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
        want_weights=batch.weights is not None,
    )
    return [out, *(g for g in (*grads, weights) if g is not None)]


def _train_batch(batch: int, longest: int, weighted: bool, seed: int) -> tuple[list[Tensor], Batch, Tensor]:
    torch.manual_seed(seed)
    cores = [
        torch.randn(p, r * q * s)
        for shape in SHAPES.values()
        for p, q, r, s in zip(shape.row_shape, shape.dim_shape, shape.ranks, shape.ranks[1:], strict=False)
    ]
    lengths = torch.full((4 * batch,), 1) if longest == 1 else torch.randint(0, longest + 1, (4 * batch,))
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


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    batch=st.integers(1, 60),
    longest=st.integers(1, 5),
    weighted=st.booleans(),
    mirrored=st.booleans(),
    rows=st.sampled_from([1, 3, 16, 100]),
    seed=st.integers(0, 2**31),
)
def test_slices_give_the_bits_of_the_whole(
    batch: int, longest: int, weighted: bool, mirrored: bool, rows: int, seed: int
) -> None:
    kernels = [kernel for _, kernel in _kernels(mirrored)]
    cores, bags, grad = _train_batch(batch, longest, weighted, seed)
    whole = _run(kernels, cores, bags, grad)
    sliced = _run(kernels, cores, bags, grad, micro_batch_rows=rows)
    for first, second in zip(whole[:1], sliced[:1], strict=True):
        assert torch.equal(first, second)
    # A core slice sums over the same nodes in another order of chains.
    for first, second in zip(whole[1:], sliced[1:], strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=2e-5)


@settings(derandomize=True, deadline=None, max_examples=15)
@given(longest=st.integers(1, 4), weighted=st.booleans(), seed=st.integers(0, 2**31))
def test_a_train_reads_the_same_from_either_end(longest: int, weighted: bool, seed: int) -> None:
    cores, bags, grad = _train_batch(40, longest, weighted, seed)
    straight = _run([kernel for _, kernel in _kernels(False)], cores, bags, grad)
    mirrored = _run([kernel for _, kernel in _kernels(True)], cores, bags, grad)
    for first, second in zip(straight, mirrored, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_the_mirror_is_taken_when_suffixes_are_shared() -> None:
    """Ids a * 56 + b with one b: 40 prefixes (i_1, i_2) but a single suffix (i_2, i_3)."""
    shape = TrainShape((40, 8, 7), (2, 2, 2), (1, 8, 8, 1))
    kernel = tt_gather.kernel(shape)
    torch.manual_seed(0)
    cores = [torch.randn(p, r * 2 * s) for p, r, s in ((40, 1, 8), (8, 8, 8), (7, 8, 1))]
    ids = torch.arange(40) * 56 + 17
    batch = Batch(ids, torch.arange(41), None, 40)
    chosen = Group([kernel], [FeatureCode(0, False)])
    never = Group([replace(kernel, mirrored_cost=())], [FeatureCode(0, False)])
    outs = [group.forward(cores, batch, keep=False)[0] for group in (chosen, never)]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
    assert not torch.equal(*outs), "both were read from the same end"


def test_memory_is_given_back_and_used_again() -> None:
    cores, bags, _ = _train_batch(20, 2, False, 0)
    group = Group([kernel for _, kernel in _kernels(False)], [FeatureCode(t, False) for t in range(4)])
    held = [group.forward(cores, bags, keep=True)[1] for _ in range(3)]
    pointers = {state.pointer for state in held}
    assert len(pointers) == 3
    assert not group.free
    del held
    assert set(group.free) == pointers
    assert group.forward(cores, bags, keep=False)[1].pointer in pointers


@pytest.mark.parametrize(
    ("ids", "offsets", "weights"),
    [
        ([0, 1, 10], [0, 1, 3], None),
        ([0, -1, 2], [0, 1, 3], None),
        ([0, 1, 2], [0, 2, 1], None),
        ([0, 1, 2], [1, 2, 3], None),
        ([0, 1, 2], [0, 2, 4], None),
        ([0, 1, 2], [0, 1, 3], [1.0, math.nan, 1.0]),
        ([0, 1, 2], [0, 1, 3], [1.0, math.inf, 1.0]),
    ],
)
def test_the_native_check_refuses_what_the_long_way_refuses(
    ids: list[int], offsets: list[int], weights: list[float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bags = Bags(
        torch.tensor(ids), torch.tensor(offsets), 1, None if weights is None else torch.tensor(weights)
    )
    with pytest.raises(BatchError) as native:
        check_bags(bags, [LookupTarget("f", "t", 10)])
    monkeypatch.setattr(check, "attempt", lambda op, call: None)
    with pytest.raises(BatchError) as torchs:
        check_bags(bags, [LookupTarget("f", "t", 10)])
    assert str(native.value) == str(torchs.value)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 3), min_size=2, max_size=12).filter(lambda x: len(x) % 2 == 0),
    bad=st.sampled_from(["none", "high", "low"]),
    seed=st.integers(0, 1000),
)
def test_the_native_check_agrees_with_a_loop(lengths: list[int], bad: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    total, batch = sum(lengths), len(lengths) // 2
    limits = (7, 3)
    ids = [
        int(torch.randint(0, limits[k // batch], (1,), generator=generator))
        for k, n in enumerate(lengths)
        for _ in range(n)
    ]
    if ids and bad != "none":
        at = int(torch.randint(0, total, (1,), generator=generator))
        ids[at] = 7 if bad == "high" else -1
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    first = offsets[batch]
    fine = all(0 <= i < limits[k >= first] for k, i in enumerate(ids))
    bags = Bags(torch.tensor(ids, dtype=torch.int64), torch.tensor(offsets), 2)
    targets = [LookupTarget("f", "t", limits[0]), LookupTarget("g", "u", limits[1])]
    if fine:
        check_bags(bags, targets)
    else:
        with pytest.raises(BatchError, match="outside"):
            check_bags(bags, targets)


def test_large_tables_are_sorted_by_all_threads_to_the_same_bits() -> None:
    spec = TableSpec(
        name="t", num_embeddings=10**6, embedding_dim=16, compression=TensorTrain(rank=4), init_std=1.0
    )
    table = build([spec], torch.device("cpu"))["t"]
    torch.manual_seed(0)
    table.reset_parameters()
    ids = (torch.rand(40_000) ** 3 * 10**6).long()
    bags = Bags(ids, torch.arange(40_001), 1)
    threads = torch.get_num_threads()
    outcomes = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            pooled = table.pooled([table], bags)
            outcomes.append(
                [pooled.detach(), *torch.autograd.grad(pooled.square().sum(), list(table.parameters()))]
            )
    finally:
        torch.set_num_threads(threads)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))
    rows = table.rows(table.map_ids(ids[:100]))
    torch.testing.assert_close(outcomes[0][0][:100], rows, rtol=1e-5, atol=1e-6)
    assert math.prod(table_shapes(spec)[0]) >= 10**6


def test_frozen_tables_ask_for_no_gradient() -> None:
    engine, tables = _engine()
    for table in tables.values():
        table.requires_grad_(False)
    bags = _bags(engine, 5, 2, seed=0)
    assert not engine(tables, bags).requires_grad
    tables["tt"].requires_grad_(True)
    pooled = engine(tables, bags)
    pooled.sum().backward()
    assert all(parameter.grad is not None for parameter in tables["tt"].parameters())
    assert all(parameter.grad is None for parameter in tables["qr"].parameters())
