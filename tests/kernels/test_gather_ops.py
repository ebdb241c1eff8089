"""The compiled kernels against plain torch in float64, through the backends they serve."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

from recemb.backends import build
from recemb.backends.base import Backend
from recemb.bags import Bags
from recemb.spec import ROBE, Compression, MixedDimension, QuotientRemainder, TableSpec, TensorTrain
from recemb_kernels import build as build_of_kernels
from recemb_kernels import robe_gather
from recemb_kernels.digit_tree.group import driver

# (N, D, compression): 2 to 5 cores; ranks below, at and between whole vectors; odd and wide last cores.
TABLES = {
    "rank32": (5000, 16, TensorTrain(rank=32)),
    "rank13": (1000, 16, TensorTrain(rank=13)),
    "two_cores": (77, 7, TensorTrain(rank=5, num_cores=2)),
    "four_cores": (5000, 12, TensorTrain(rank=(3, 9, 2), num_cores=4)),
    "five_cores": (3000, 32, TensorTrain(rank=8, num_cores=5)),
    "wide": (2000, 64, TensorTrain(rank=24)),
    "one_column": (300, 1, TensorTrain(rank=3)),
    "long_runs": (1800, 16, TensorTrain(rank=13, row_shape=(300, 2, 3))),
    "given_shape": (60, 8, TensorTrain(rank=1, row_shape=(3, 4, 5), dim_shape=(4, 1, 2))),
    "many_rows": (600, 16, TensorTrain(rank=16, row_shape=(3, 2, 100), dim_shape=(1, 1, 16))),
    "few_slices": (1800, 16, TensorTrain(rank=16, row_shape=(300, 2, 3), dim_shape=(1, 1, 16))),
    "few_wide": (520, 128, TensorTrain(rank=64, row_shape=(130, 2, 2), dim_shape=(2, 1, 64))),
    "many_wide": (520, 128, TensorTrain(rank=64, row_shape=(2, 2, 130), dim_shape=(2, 1, 64))),
    # What a row would send is as large as a slice of whole vectors.
    "square": (600, 256, TensorTrain(rank=5, num_cores=2, row_shape=(30, 20), dim_shape=(16, 16))),
    "square_last": (600, 256, TensorTrain(rank=5, row_shape=(6, 10, 10), dim_shape=(4, 4, 16))),
    # A batch may hold enough rows for several parts, whose rows send, or whose prefixes do.
    "parts": (200_000, 16, TensorTrain(rank=16)),
    "parts_of_prefixes": (200_000, 8, TensorTrain(rank=5, dim_shape=(2, 2, 2))),
    "parts_of_two_cores": (200_000, 16, TensorTrain(rank=6, num_cores=2)),
    "many_digits": (18000, 4, TensorTrain(rank=2, num_cores=2, row_shape=(3, 6000), dim_shape=(2, 2))),
    "many_remainders": (18000, 4, QuotientRemainder(collisions=6000)),
    "mult": (1000, 16, QuotientRemainder(collisions=7)),
    "mult_odd": (999, 7, QuotientRemainder(collisions=300)),
    "add": (1000, 16, QuotientRemainder(collisions=40, operation="add")),
    "concat": (1000, 9, QuotientRemainder(collisions=40, operation="concat")),
    "mult_few": (3000, 16, QuotientRemainder(collisions=3)),
    "concat_few": (3000, 9, QuotientRemainder(collisions=3, operation="concat")),
    "one_quotient": (50, 4, QuotientRemainder(collisions=50)),
    "narrow": (1000, 16, MixedDimension(dim=3)),
    "narrowest": (1000, 8, MixedDimension(dim=1)),
    "robe_row": (1000, 16, ROBE(compress_rate=20, block_size=16, group="row")),
    "robe_short": (999, 16, ROBE(compress_rate=20, block_size=5, group="short", use_sign=True)),
    "robe_long": (300, 6, ROBE(compress_rate=9, block_size=16, group="long")),
    "robe_single": (50, 16, ROBE(compress_rate=50, block_size=16, group="single", use_sign=True)),
    "robe_ones": (500, 7, ROBE(compress_rate=10, block_size=1, group="ones")),
    "robe_shared": (700, 16, ROBE(compress_rate=30, block_size=8, group="shared")),
    "robe_sharing": (40, 16, ROBE(compress_rate=30, block_size=8, group="shared")),
    "robe_rows": (6000, 16, ROBE(compress_rate=2, block_size=16, group="rows", use_sign=True)),
    "robe_blocks": (6000, 16, ROBE(compress_rate=4, block_size=4, group="blocks")),
    "robe_longest": (3000, 16, ROBE(compress_rate=2, block_size=1500, group="longest", use_sign=True)),
}
TRAINS = sorted(name for name, (_, _, c) in TABLES.items() if isinstance(c, TensorTrain))
ROWS = sorted(name for name, (_, _, c) in TABLES.items() if isinstance(c, QuotientRemainder))
ROBES = sorted(name for name, (_, _, c) in TABLES.items() if isinstance(c, ROBE))
# Of more array rows than are added up at once.
LARGE_ROBES = ["robe_rows", "robe_blocks", "robe_longest"]
NARROW = sorted(name for name, (_, _, c) in TABLES.items() if isinstance(c, MixedDimension))


def _tables(names: Sequence[str], pooling: str) -> list[Backend]:
    specs = [
        TableSpec(name=name, num_embeddings=n, embedding_dim=d, compression=c, pooling=pooling, init_std=0.5)
        for name in names
        for n, d, c in (TABLES[name],)
    ]
    built = build(specs, torch.device("cpu"))
    for table in built.values():
        table.reset_parameters()
    return list(built.values())


def _bags(tables: Sequence[Backend], batch: int, longest: int, *, weighted: bool, seed: int) -> Bags:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (len(tables) * batch,), generator=generator)
    if longest == 1:
        lengths.fill_(1)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    ids = [
        # Squared uniforms: hot ids repeat, as in real logs.
        (torch.rand(int(part.sum()), generator=generator) ** 2 * table.table.num_embeddings).long()
        for table, part in zip(tables, lengths.split(batch), strict=True)
    ]
    flat = torch.cat(ids)
    weights = torch.rand(flat.numel(), generator=generator, requires_grad=True) if weighted else None
    return Bags(flat, offsets, len(tables), weights)


def _parameters(tables: Sequence[Backend]) -> list[Tensor]:
    stored = [core for table in tables for core in table.own_parameters().values()]
    return list(dict.fromkeys(stored))


def _outcome(tables: Sequence[Backend], bags: Bags, grad: Tensor | None, *, native: bool) -> list[Tensor]:
    """Pooled values, core gradients and weight gradients on one of the two paths."""
    kind = type(tables[0])
    pooled = kind.pooled(tables, bags) if native else kind.pooled_plain(tables, bags)
    wanted = _parameters(tables) + ([] if bags.weights is None else [bags.weights])
    upstream = torch.ones_like(pooled) if grad is None else grad.to(pooled.dtype)
    return [pooled.detach(), *torch.autograd.grad(pooled, wanted, upstream)]


def _assert_error_law(
    names: Sequence[str], *, pooling: str, weighted: bool, longest: int, seed: int, batch: int = 29
) -> None:
    """max |x - ref64| <= 2 x the error of plain torch in float32, plus one ulp of the largest value."""
    torch.manual_seed(seed)
    tables = _tables(names, pooling)
    bags = _bags(tables, batch, longest, weighted=weighted, seed=seed)
    grad = torch.randn(batch, sum(table.table.embedding_dim for table in tables))
    native = _outcome(tables, bags, grad, native=True)
    plain = _outcome(tables, bags, grad, native=False)
    for table in tables:
        table.double()
    wide = Bags(bags.ids, bags.offsets, bags.num_features, None)
    if bags.weights is not None:
        weights = bags.weights.detach().double().requires_grad_()
        wide = Bags(bags.ids, bags.offsets, bags.num_features, weights)
    exact = _outcome(tables, wide, grad, native=False)
    for ours, torchs, truth in zip(native, plain, exact, strict=True):
        assert ours.shape == truth.shape
        ulp = torch.finfo(torch.float32).eps * float(truth.abs().max()) if truth.numel() else 0.0
        error = float((ours - truth).abs().max()) if truth.numel() else 0.0
        allowed = 2 * float((torchs - truth).abs().max()) + ulp if truth.numel() else 0.0
        assert error <= allowed


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(("pooling", "weighted"), [("sum", False), ("sum", True), ("mean", False)])
def test_error_law_of_one_table(name: str, pooling: str, weighted: bool) -> None:
    _assert_error_law([name], pooling=pooling, weighted=weighted, longest=4, seed=1)


@pytest.mark.parametrize("longest", [1, 3])
@pytest.mark.parametrize(
    "name",
    ["long_runs", "many_rows", "many_wide", "few_slices", "few_wide", "mult_few", *LARGE_ROBES],
)
def test_error_law_of_more_than_is_held_at_once(name: str, longest: int) -> None:
    """Prefixes of one digit, of a rank between vectors; rows of a prefix, slice, remainder, array."""
    _assert_error_law([name], pooling="sum", weighted=False, longest=longest, seed=1, batch=700)


@pytest.mark.parametrize("name", ["many_digits", "many_remainders"])
def test_error_law_of_more_digits_than_are_counted(name: str) -> None:
    """4,096 are; this batch holds more, the others of these tables fewer."""
    bags = _bags(_tables([name], "sum"), 12_000, 1, weighted=False, seed=1)
    assert (bags.ids % 6000).unique().numel() > 4096
    _assert_error_law([name], pooling="sum", weighted=False, longest=1, seed=1, batch=12_000)


@pytest.mark.parametrize(("longest", "weighted"), [(1, False), (1, True), (3, False)])
def test_error_law_of_gradients_that_no_core_holds(longest: int, weighted: bool) -> None:
    """Rows add theirs up in a pass of its own, before those of the products above them."""
    names, batch = ["wide", "rank13", "few_slices", "four_cores"], 2600
    assert batch * sum(TABLES[name][1] for name in names) * 4 > 2**20
    _assert_error_law(names, pooling="sum", weighted=weighted, longest=longest, seed=1, batch=batch)


@pytest.mark.parametrize("alone", [0, 1])
@pytest.mark.parametrize(("longest", "weighted"), [(1, False), (1, True), (2, True)])
def test_error_law_of_tables_in_parts(
    longest: int,
    weighted: bool,
    alone: int,
    set_threads: Callable[[int], None],
    set_alone: Callable[[int], None],
) -> None:
    """Of at least two, each one thread's, or all threads' one after the other."""
    names, batch = ["parts", "parts_of_prefixes", "parts_of_two_cores"], 40_000
    tables = _tables(names, "sum")
    bags = _bags(tables, batch, longest, weighted=weighted, seed=1)
    assert all(bags.feature(f).ids.unique().numel() > 2**14 for f in range(len(names)))
    set_alone(alone)
    set_threads(2)
    _assert_error_law(names, pooling="sum", weighted=weighted, longest=longest, seed=1, batch=batch)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    names=st.one_of(
        st.lists(st.sampled_from(names), min_size=1, max_size=5, unique=True)
        for names in (TRAINS, ROWS, NARROW, ROBES)
    ),
    longest=st.integers(1, 6),
    weighted=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_error_law_of_several_tables_in_one_call(
    names: list[str], longest: int, weighted: bool, seed: int
) -> None:
    _assert_error_law(names, pooling="sum", weighted=weighted, longest=longest, seed=seed)


def test_a_table_of_several_features_is_updated_once() -> None:
    torch.manual_seed(0)
    (table,) = _tables(["rank13"], "sum")
    bags = _bags([table] * 3, 11, 3, weighted=False, seed=3)
    native = _outcome([table] * 3, bags, None, native=True)
    plain = _outcome([table] * 3, bags, None, native=False)
    for ours, torchs in zip(native, plain, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("names", [["rank13", "two_cores"], ["mult", "mult_odd"], ["robe_row", "robe_ones"]])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_empty_bags_and_batches(batch: int, names: list[str]) -> None:
    tables = _tables(names, "mean")
    bags = Bags(torch.empty(0, dtype=torch.int64), torch.zeros(2 * batch + 1, dtype=torch.int64), 2)
    pooled, *grads = _outcome(tables, bags, None, native=True)
    assert pooled.shape == (batch, 23)
    assert not pooled.any()
    assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize(
    "names", [["rank32", "four_cores"], ["mult", "concat", "one_quotient"], NARROW, ROBES]
)
def test_uninitialised_memory_never_shows(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tables = _tables(names, "sum")
    bags = _bags(tables, 17, 3, weighted=True, seed=5)
    clean = _outcome(tables, bags, None, native=True)
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, **kw: empty(*size, **kw).fill_(math.nan if not kw else 7)
    )
    driver().recemb_tree_poison(1)
    try:
        outcome = _outcome(tables, bags, None, native=True)
    finally:
        driver().recemb_tree_poison(0)
    for poisoned, expected in zip(outcome, clean, strict=True):
        assert torch.equal(poisoned, expected)


@pytest.mark.parametrize("names", [["rank32", "wide", "two_cores"], ROWS, NARROW, ROBES])
def test_bit_identical_between_runs_and_thread_counts(
    names: list[str], set_threads: Callable[[int], None]
) -> None:
    torch.manual_seed(0)
    tables = _tables(names, "sum")
    bags = _bags(tables, 200, 5, weighted=True, seed=7)
    outcomes = []
    for count in (1, 2, 3, 2):
        set_threads(count)
        outcomes.append(_outcome(tables, bags, None, native=True))
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


def test_blocks_of_arrays_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such an array takes 17 GB: here kernels are told that it begins at 4 bits."""

    def outcome() -> list[Tensor]:
        torch.manual_seed(0)
        tables = _tables(ROBES, "sum")
        return _outcome(tables, _bags(tables, 200, 3, weighted=True, seed=7), None, native=True)

    narrow = outcome()
    monkeypatch.setattr(build_of_kernels, "FLAGS", (*build_of_kernels.FLAGS, "-DWIDE_BITS=4"))
    robe_gather._library.cache_clear()
    try:
        wide = outcome()
    finally:
        robe_gather._library.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def test_sample_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    (table,) = _tables(["rank32"], "sum")
    ids = torch.randint(0, 5000, (64,))
    whole = table.pooled([table], Bags(ids, torch.arange(65), 1))
    for b in range(64):
        alone = table.pooled([table], Bags(ids[b : b + 1], torch.arange(2), 1))
        assert torch.equal(alone[0], whole[b])


@pytest.mark.parametrize("position", [2**31 - 1, 2**31, 2**31 + 1, 2**33 - 1])
@pytest.mark.parametrize(
    "compression",
    [TensorTrain(rank=4), QuotientRemainder(collisions=2**17), ROBE(compress_rate=10**6, block_size=16)],
    ids=lambda compression: compression.method,
)
def test_f14_ids_beyond_32_bits(compression: Compression, position: int) -> None:
    spec = TableSpec(name="t", num_embeddings=2**33, embedding_dim=16, compression=compression, init_std=1.0)
    built = build([spec], torch.device("cpu"))["t"]
    built.reset_parameters()
    ids = torch.tensor([0, position, position])
    native = built.pooled([built], Bags(ids, torch.tensor([0, 1, 3]), 1))
    rows = built.rows(built.map_ids(ids))
    torch.testing.assert_close(native, torch.stack([rows[0], 2 * rows[1]]), rtol=1e-5, atol=1e-6)
    native.sum().backward()
    ours = [parameter.grad for parameter in built.parameters()]
    torchs = torch.autograd.grad(built.rows(built.map_ids(ids)).sum(), list(built.parameters()))
    for first, second in zip(ours, torchs, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_f14_a_stored_table_of_more_than_2_to_the_31_rows() -> None:
    """8.6 GB of address space, of which the few rows touched are backed by memory."""
    rows = 2**31 + 8
    spec = TableSpec(name="t", num_embeddings=rows, embedding_dim=1)
    table = build([spec], torch.device("cpu"))["t"]
    (weight,) = table.parameters()
    apply_optimizer_in_backward(torch.optim.SGD, table.parameters(), {"lr": 0.5})
    ids = torch.tensor([2**31 - 1, 2**31, 2**31 + 7, 2**31])
    with torch.no_grad():
        weight[ids] = torch.tensor([[1.0], [2.0], [4.0], [2.0]])
    pooled = table.pooled([table], Bags(ids, torch.tensor([0, 2, 4]), 1))
    assert torch.equal(pooled, torch.tensor([[3.0], [6.0]]))
    pooled.backward(torch.tensor([[1.0], [2.0]]))
    assert torch.equal(weight[ids].detach(), torch.tensor([[0.5], [0.5], [3.0], [0.5]]))


def _raw(names: Sequence[str]) -> tuple[Any, list[Tensor], tuple[Any, ...]]:
    """The op that serves these tables, their parameters, and the rest of its arguments."""
    torch.manual_seed(0)
    tables = _tables(names, "sum")
    bags = _bags(tables, 9, 3, weighted=True, seed=9)
    shapes = [shape for shape in (table.native_shape() for table in tables) if shape is not None]
    (op,) = {shape.op for shape in shapes}
    code, features = op.encode([shape.shape for shape in shapes]), (0, 0, 0, 1, 0, 0)
    return op, _parameters(tables), (bags.ids, bags.offsets, bags.weights, bags.batch_size, code, features)


OPS = [["rank13", "two_cores"], ["mult", "concat"], ["narrow", "narrowest"], ["robe_row", "robe_ones"]]


@pytest.mark.parametrize("names", OPS, ids=lambda names: names[0])
def test_opcheck_and_compile(names: list[str]) -> None:
    op, parameters, rest = _raw(names)
    torch.library.opcheck(getattr(torch.ops.recemb, op.name).default, (parameters, *rest))

    def lookup(*own: Tensor) -> Tensor:
        return 2 * op(own, *rest)

    compiled = torch.compile(lookup, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(lookup(*parameters).sum(), parameters)
    actual = torch.autograd.grad(compiled(*parameters).sum(), parameters)
    assert torch.equal(compiled(*parameters), lookup(*parameters))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("names", OPS, ids=lambda names: names[0])
@pytest.mark.parametrize("wrong", ["parameters", "ids", "offsets", "weights"])
def test_an_op_reads_no_other_type(names: list[str], wrong: str) -> None:
    """Its kernels would take the bytes for those that they expect."""
    op, parameters, (ids, offsets, weights, *rest) = _raw(names)
    given = {"parameters": parameters, "ids": ids, "offsets": offsets, "weights": weights}
    other = {
        "parameters": [p.double() for p in parameters],
        "ids": ids.int(),
        "offsets": offsets.int(),
        "weights": weights.double(),
    }
    said = rf"recemb::{op.name}: {wrong} of torch.(float64|int32) must be torch.(float32|int64)"
    with pytest.raises(TypeError, match=said):
        op(*(given | {wrong: other[wrong]}).values(), *rest)
