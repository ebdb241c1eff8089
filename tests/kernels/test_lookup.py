"""The eager look-up: all methods in one call, slices, mirrored trains, checks of a batch."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch
from weakref import ref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recemb.backends import build
from recemb.backends.native import pooled_native
from recemb.bags import Bags, LookupTarget, LookupTargets, check_bags
from recemb.engine import Engine
from recemb.errors import BatchError
from recemb.spec import ROBE, Compression, TableSpec, TensorTrain
from recemb_kernels import check, native
from recemb_kernels.digit_tree.group import FeatureCode, Group, driver
from tests.kernels.cases import (
    METHODS,
    group_of,
    make_bags,
    make_engine,
    make_kernels,
    plain,
    step_or_skip,
    train_batch,
)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Workspaces hold NaN wherever they have not been written."""
    driver().recemb_tree_poison(1)
    yield
    driver().recemb_tree_poison(0)


@pytest.mark.parametrize("longest", [1, 4])
def test_tables_of_all_methods_go_through_one_call(longest: int) -> None:
    engine, tables = make_engine()
    bags = make_bags(engine, 37, longest, seed=1)
    with torch.no_grad():
        whole = pooled_native([tables[t.table] for t in engine.targets], bags)
        assert whole is not None
        torch.testing.assert_close(whole, plain(engine, tables, bags), rtol=1e-5, atol=1e-6)
        # Each method alone, which is what torch.compile gets, gives the same bits.
        alone = [
            tables[t.table].pooled([tables[t.table]], bags.feature(f)) for f, t in enumerate(engine.targets)
        ]
    assert torch.equal(whole, torch.cat(alone, dim=1))


@pytest.mark.parametrize(("batch", "methods"), [(37, tuple(METHODS)), (9000, ("qr", "dense"))])
@pytest.mark.parametrize("longest", [1, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_backward_of_one_look_up_can_be_repeated(
    batch: int, methods: Sequence[str], longest: int, weighted: bool, poisoned: None
) -> None:
    engine, tables = make_engine(methods=methods)
    bags = make_bags(engine, batch, longest, seed=2)
    leaves = [p for table in tables.values() for p in table.parameters()]
    if weighted:
        bags.weights = torch.rand(bags.ids.numel()).requires_grad_()
        leaves.append(bags.weights)
    out = engine(tables, bags)
    upstream = torch.randn(out.shape)
    first, second, third = (torch.autograd.grad(out, leaves, upstream, retain_graph=True) for _ in range(3))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
    if weighted:
        return  # torch's bags do not average weighted rows
    reference = torch.autograd.grad(plain(engine, tables, bags), leaves, upstream)
    for found, right in zip(first, reference, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3)


def test_memory_is_given_back_and_used_again() -> None:
    cores, bags, _ = train_batch(20, 2, False, 0)
    group = Group([kernel for _, kernel in make_kernels(False)], [FeatureCode(t, False) for t in range(4)])
    held = [group.forward(cores, bags, keep=True)[1] for _ in range(3)]
    pointers = {state.pointer for state in held}
    assert len(pointers) == 3
    assert not group.at_rest
    del held
    assert group.at_rest == 3
    assert group.forward(cores, bags, keep=False)[1].pointer in pointers


@pytest.mark.parametrize("again", [False, True])
def test_a_backward_gives_the_memory_back_though_its_output_is_kept(again: bool) -> None:
    engine, tables = make_engine(methods=("tt", "qr"))
    bags = make_bags(engine, 9, 2, seed=1)
    kept = [engine(tables, bags) for _ in range(3)]
    found = group_of(tables)
    free = found.at_rest
    for out in kept:
        out.sum().backward(retain_graph=again)
    assert found.at_rest == free + (0 if again else 3)
    if again:
        kept[0].sum().backward()
        assert found.at_rest == free + 1
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        kept[0].sum().backward()


def test_threads_share_the_memory_at_rest() -> None:
    cores, bags, _ = train_batch(20, 2, False, 0)
    group = Group([kernel for _, kernel in make_kernels(False)], [FeatureCode(t, False) for t in range(4)])
    expected, _ = group.forward(cores, bags, keep=False)

    def many(_: int) -> bool:
        return all(torch.equal(group.forward(cores, bags, keep=False)[0], expected) for _ in range(50))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(many, range(8)))
    assert 1 <= group.at_rest <= 8


def test_memory_may_outlive_its_group() -> None:
    cores, bags, _ = train_batch(20, 2, False, 0)
    groups = [
        Group([kernel for _, kernel in make_kernels(False)], [FeatureCode(t, False) for t in range(4)])
        for _ in range(2)
    ]
    states = [group.forward(cores, bags, keep=True)[1] for group in groups for _ in range(2)]
    gone = ref(groups[0])
    del groups[0]
    assert gone() is None
    del states
    assert groups[0].at_rest == 2


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
    monkeypatch.setattr(check, "loaded", [])
    with pytest.raises(BatchError) as torchs:
        check_bags(bags, [LookupTarget("f", "t", 10)])
    assert str(native.value) == str(torchs.value)


@pytest.mark.parametrize("compiled", [True, False])
def test_the_native_check_reads_what_it_can_read(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "loaded", [step_or_skip()] if compiled else [])
    ids, offsets, weights = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 1, 4]), torch.ones(4)
    rows = LookupTargets([LookupTarget("f", "t", 3)]).limits
    assert check.bags_are_valid(ids, offsets, weights, 1, rows)
    assert check.bags_are_valid(ids * 9, offsets, None, 1, None)
    assert check.bags_are_valid(ids[:0], torch.zeros(1, dtype=torch.int64), weights[:0], 1, rows)
    for wrong in (ids.int(), ids[None], torch.stack([ids, ids], 1)[:, 0], ids.to("meta")):
        assert not check.bags_are_valid(wrong, offsets, weights, 1, rows)
    for wrong in (offsets.int(), offsets[:0], torch.stack([offsets, offsets], 1)[:, 0], offsets.to("meta")):
        assert not check.bags_are_valid(ids, wrong, weights, 1, rows)
    for wrong in (weights.double(), weights[:3], weights.to("meta")):
        assert not check.bags_are_valid(ids, offsets, wrong, 1, rows)
    assert not check.bags_are_valid(ids, offsets, weights, 3, rows), "two bags of three features"
    assert not check.bags_are_valid(ids, offsets, weights, 0, rows)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 3), min_size=2, max_size=12).filter(lambda x: len(x) % 2 == 0),
    bad=st.sampled_from(["none", "high", "low"]),
    seed=st.integers(0, 1000),
    compiled=st.booleans(),
)
def test_the_native_check_agrees_with_a_loop(lengths: list[int], bad: str, seed: int, compiled: bool) -> None:
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
    rows = LookupTargets(targets).limits
    with patch.object(check, "loaded", [step_or_skip()] if compiled else []):
        assert check.bags_are_valid(bags.ids, bags.offsets, None, 2, rows) == fine
        if fine:
            check_bags(bags, targets)
        else:
            with pytest.raises(BatchError, match="outside"):
                check_bags(bags, targets)


def test_frozen_tables_ask_for_no_gradient() -> None:
    engine, tables = make_engine()
    for table in tables.values():
        table.requires_grad_(False)
    bags = make_bags(engine, 5, 2, seed=0)
    assert not engine(tables, bags).requires_grad
    tables["tt"].requires_grad_(True)
    pooled = engine(tables, bags)
    pooled.sum().backward()
    assert all(parameter.grad is not None for parameter in tables["tt"].parameters())
    assert all(parameter.grad is None for parameter in tables["qr"].parameters())


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dense"])
def test_a_look_up_is_exported_as_its_op(name: str) -> None:
    _, tables = make_engine()
    table = tables[name]

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = table

        def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
            pooled: Tensor = type(table).pooled([self.table], Bags(ids, offsets, 1))
            return pooled

    batch = (torch.randint(0, table.table.num_embeddings, (8,)), torch.arange(9))
    with torch.no_grad():
        program = torch.export.export(Pooled(), batch, strict=False)
        assert torch.equal(program.module()(*batch), Pooled()(*batch))
    shape = table.native_shape()
    assert shape is not None
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls == [f"recemb.{shape.op.name}.default"]


def test_there_is_no_second_derivative_of_a_linear_loss_either() -> None:
    engine, tables = make_engine()
    bags = make_bags(engine, 9, 2, seed=1)
    parameters = [parameter for table in tables.values() for parameter in table.own_parameters().values()]
    first = torch.autograd.grad(engine(tables, bags).sum(), parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(sum(each.square().sum() for each in first), parameters, allow_unused=True)


def test_gradients_that_could_be_differentiated_again_can_be_changed_in_place() -> None:
    engine, tables = make_engine()
    bags = make_bags(engine, 9, 2, seed=1)
    parameters = [parameter for table in tables.values() for parameter in table.own_parameters().values()]
    for gradient in torch.autograd.grad(engine(tables, bags).sum(), parameters, create_graph=True):
        expected = gradient.detach() * 0.5
        gradient.mul_(0.5)
        assert torch.equal(gradient.detach_(), expected)


def test_a_forked_child_prepares_batches_in_a_thread_of_its_own() -> None:
    engine, tables = make_engine()
    bags = make_bags(engine, 9, 2, seed=1)
    with torch.no_grad():
        engine.prefetch(tables, bags)
        expected = engine(tables, bags)
    child = os.fork()
    if child == 0:
        # Of the parent's OpenMP threads there are none here.
        torch.set_num_threads(1)
        signal.alarm(30)
        again = make_bags(engine, 9, 2, seed=1)
        with torch.no_grad():
            engine.prefetch(tables, again)
            os._exit(0 if torch.equal(engine(tables, again), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("compression", "reason"),
    [
        (TensorTrain(rank=2, num_cores=4, row_shape=(2**16,) * 4), r"less than 2\*\*63 rows"),
        (TensorTrain(rank=2, num_cores=9, row_shape=(2**6,) * 9), "up to 8 cores, and this one has 9"),
        (ROBE(compress_rate=1, block_size=500_000), "blocks of up to 8192 weights"),
    ],
)
def test_what_kernels_cannot_count_or_hold_is_left_to_plain_torch(
    compression: Compression, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_said", set())
    table = TableSpec(
        name="t",
        num_embeddings=2**54 if isinstance(compression, TensorTrain) else 2**17,
        embedding_dim=16,
        feature_names=("f",),
        compression=compression,
    )
    tables = build([table], torch.device("cpu"))
    tables["t"].reset_parameters()
    assert tables["t"].native_shape() is None
    if isinstance(compression, TensorTrain):
        ids = (torch.arange(64)[:, None] * 2**48 + torch.arange(4) * 1024).flatten()
    else:
        ids = torch.tensor([0, 1, 1024, 100_000])
    engine, bags = Engine([table]), Bags(ids, torch.arange(len(ids) + 1), 1)
    with pytest.warns(UserWarning, match=f"table 't' runs on plain torch, which is slower: .*{reason}"):
        pooled = engine(tables, bags)
    pooled.square().sum().backward()
    rows = tables["t"].rows(tables["t"].map_ids(ids))
    parameters = list(tables["t"].own_parameters().values())
    expected = torch.autograd.grad(rows.square().sum(), parameters)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_tables_without_a_kernel_warn_once_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_said", set())
    shared = ROBE(compress_rate=2, block_size=4)
    specs = [
        TableSpec(
            name=f"t{dim}",
            num_embeddings=100,
            embedding_dim=dim,
            feature_names=(f"f{dim}",),
            compression=shared,
        )
        for dim in (4, 8)
    ]
    bags = Bags(torch.tensor([1, 2]), torch.arange(3), 2)

    def look_up_in_two_models() -> None:
        for _ in range(2):
            Engine(specs)(build(specs, torch.device("cpu")), bags)

    with pytest.warns(UserWarning, match="table 't4' .* of one dim; give each dim a group of its own") as met:
        look_up_in_two_models()
    assert len([warning for warning in met if "plain torch" in str(warning.message)]) == 1
