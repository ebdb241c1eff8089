"""Steps in the backward: an optimizer a table, what is refused, what is read before it moves."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable

import pytest
import torch
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

from recemb.backends import build
from recemb.backends.native import pooled_native, served_natively
from recemb.bags import Bags
from recemb.engine import Engine
from recemb.errors import NonFiniteError
from recemb.spec import Dense, QuotientRemainder, TableSpec, TensorTrain
from recemb_kernels import native
from recemb_kernels.build import KernelUnavailableError
from recemb_kernels.digit_tree.group import FeatureCode, Group, TableKernel, driver
from recemb_kernels.tt_gather import TrainShape, tt_gather
from recemb_kernels.update import Kind, Update
from tests.kernels.cases import (
    METHODS,
    make_bags,
    make_engine,
    make_kernels,
    plain,
    step_all,
    step_or_skip,
    train_batch,
)


@pytest.mark.parametrize("longest", [1, 4])
def test_every_table_steps_with_its_own_optimizer(longest: int) -> None:
    engine, tables = make_engine()
    _, twins = make_engine()
    settings = {
        "tt": (torch.optim.SGD, {"lr": 0.1}),
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
        bags = make_bags(engine, 29, longest, seed=step)
        grad = torch.randn(29, 16 * len(METHODS), generator=torch.Generator().manual_seed(step))
        engine(tables, bags).backward(grad)
        plain(engine, twins, bags).backward(grad)
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
    engine, tables = make_engine()
    for table in tables.values():
        apply_optimizer_in_backward(torch.optim.Adagrad, table.parameters(), {"lr": 0.1})
    parameters = [p for table in tables.values() for p in table.parameters()]
    states = [p._in_backward_optimizers[0].state[p] for p in parameters]
    before = [
        (p.detach().clone(), s["sum"].clone(), s["step"].clone())
        for p, s in zip(parameters, states, strict=True)
    ]
    pooled = engine(tables, make_bags(engine, 9, 3, seed=0))
    grad = torch.zeros_like(pooled)
    grad[4, 40] = value
    with pytest.raises(NonFiniteError, match=r"tables tt, dense, robe.*none of their weights was changed"):
        pooled.backward(grad)
    for parameter, state, (weight, total, step) in zip(parameters, states, before, strict=True):
        assert torch.equal(parameter, weight)
        assert torch.equal(state["sum"], total)
        assert torch.equal(state["step"], step)


@pytest.mark.parametrize("rows", [1, 100, 2**14])
@pytest.mark.parametrize("mirrored", [False, True])
def test_updates_in_place_on_several_threads_read_nothing_that_has_moved(rows: int, mirrored: bool) -> None:
    """Batches large enough for several threads: SGD on gradients, and in the backward, give the same."""
    kernels = [kernel for _, kernel in make_kernels(mirrored)]
    cores, batch, grad = train_batch(1500, 1, False, seed=rows)
    group = Group(kernels, [FeatureCode(t, False) for t in range(len(kernels))], rows)
    arguments = {"wanted": [True] * len(cores), "want_weights": False}
    _, state = group.forward(cores, batch, keep=True)
    grads, _ = group.backward(grad, cores, batch, state, updates=[None] * len(kernels), **arguments)
    expected = [core - 0.01 * g for core, g in zip(cores, grads, strict=True) if g is not None]
    for _ in range(5):
        moved = [core.clone() for core in cores]
        _, state = group.forward(moved, batch, keep=True)
        step = Update(Kind.SGD, lr=0.01)
        group.backward(grad, moved, batch, state, updates=[step] * len(kernels), **arguments)
        for ours, truth in zip(moved, expected, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("longest", [1, 3])
def test_large_batches_of_all_methods_step_like_plain_torch(longest: int) -> None:
    engine, tables = make_engine()
    _, twins = make_engine()
    step_all(tables, torch.optim.SGD, 0.01)
    bags = make_bags(engine, 2000, longest, seed=5)
    grad = torch.randn(2000, 16 * len(METHODS), generator=torch.Generator().manual_seed(1))
    engine(tables, bags).backward(grad)
    plain(engine, twins, bags).backward(grad)
    for name in METHODS:
        for ours, torchs in zip(tables[name].parameters(), twins[name].parameters(), strict=True):
            truth = torchs - 0.01 * torchs.grad
            torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
def test_more_distinct_rows_than_a_micro_batch(operation: str) -> None:
    compression = QuotientRemainder(collisions=64, operation=operation)
    spec = TableSpec(name="t", num_embeddings=200_000, embedding_dim=8, compression=compression, init_std=0.5)
    table = build([spec], torch.device("cpu"))["t"]
    torch.manual_seed(0)
    table.reset_parameters()
    bags = Bags(torch.randint(0, 200_000, (40_000,)), torch.arange(40_001), 1)
    grad = torch.randn(40_000, 8)
    ours = torch.autograd.grad(table.pooled([table], bags), list(table.parameters()), grad)
    plain = torch.autograd.grad(table.pooled_plain([table], bags), list(table.parameters()), grad)
    for first, second in zip(ours, plain, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("which", ["ids", "offsets"])
def test_a_batch_changed_before_the_backward_is_noticed(which: str) -> None:
    engine, tables = make_engine()
    step_all(tables, torch.optim.SGD, 0.1)
    bags = make_bags(engine, 9, 2, seed=0)
    pooled = engine(tables, bags)
    getattr(bags, which).fill_(10**12)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        pooled.sum().backward()


@pytest.mark.parametrize("name", METHODS)
def test_two_look_ups_before_the_backward_are_two_steps(name: str) -> None:
    """The second step's gradient is that of the weights which the first step left."""
    engine, tables = make_engine()
    _, twins = make_engine()
    (target,) = [t for t in engine.targets if t.table == name]
    ours, twin = tables[name], twins[name]
    apply_optimizer_in_backward(torch.optim.SGD, ours.parameters(), {"lr": 0.05})
    reference = torch.optim.SGD(twin.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(3)
    batches = [
        Bags(torch.randint(0, target.num_embeddings, (40,), generator=generator), torch.arange(41), 1)
        for _ in range(2)
    ]
    grads = [torch.randn(40, 16, generator=generator) for _ in range(2)]
    outs = [ours.pooled([ours], bags) for bags in batches]
    for out, bags, grad in zip(outs, batches, grads, strict=True):
        out.backward(grad)
        reference.zero_grad()
        twin.pooled_plain([twin], bags).backward(grad)
        reference.step()
    for first, second in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_frozen_tables_are_not_stepped() -> None:
    engine, tables = make_engine()
    step_all(tables, torch.optim.SGD, 0.1)
    frozen = [name for name in METHODS if name != "tt"]
    for name in frozen:
        tables[name].requires_grad_(False)
    before = {name: [p.detach().clone() for p in table.parameters()] for name, table in tables.items()}
    engine(tables, make_bags(engine, 9, 2, seed=0)).sum().backward()
    for name, table in tables.items():
        same = [torch.equal(p, old) for p, old in zip(table.parameters(), before[name], strict=True)]
        assert all(same) if name in frozen else not all(same)


def test_one_table_on_plain_torch_leaves_the_others_fused() -> None:
    engine, tables = make_engine()
    _, twins = make_engine()
    tables["qr"].double()
    step_all(tables, torch.optim.SGD, 0.1)
    step_all(twins, torch.optim.SGD, 0.1)
    bags = make_bags(engine, 9, 2, seed=0)
    engine(tables, bags).float().sum().backward()
    engine(twins, bags).sum().backward()
    for name in METHODS:
        for ours, theirs in zip(tables[name].parameters(), twins[name].parameters(), strict=True):
            torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-5)


def test_default_dtype_and_device_change_nothing() -> None:
    engine, tables = make_engine()
    bags = make_bags(engine, 9, 2, seed=0)
    with torch.no_grad():
        expected = engine(tables, bags)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), torch.device("meta"):
            assert torch.equal(engine(tables, bags), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_backward_may_meet_more_threads_than_the_forward(set_threads: Callable[[int], None]) -> None:
    specs = [
        TableSpec(name=name, num_embeddings=2**22, embedding_dim=4, compression=compression)
        for name, compression in (("t", TensorTrain(rank=4)), ("d", Dense()))
    ]
    tables = build(specs, torch.device("cpu"))
    step_all(tables, torch.optim.SGD, 0.1)
    served = list(tables.values())
    bags = Bags(torch.randint(0, 2**22, (80_000,)), torch.arange(80_001), 2)
    set_threads(1)
    pooled = pooled_native(served, bags)
    assert pooled is not None
    set_threads(4)
    pooled.sum().backward()


def test_a_collection_is_freed_without_the_collector() -> None:
    engine, tables = make_engine()
    engine(tables, make_bags(engine, 3, 1, seed=0))
    gone = [weakref.ref(table) for table in tables.values()]
    gc.disable()
    try:
        del tables
        assert all(table() is None for table in gone)
    finally:
        gc.enable()


def test_a_kernel_that_does_not_compile_leaves_the_others_native(monkeypatch: pytest.MonkeyPatch) -> None:
    step_or_skip()  # which would warn beside
    engine, tables = make_engine()
    _, twins = make_engine()
    monkeypatch.setattr(native, "_unavailable", {})
    wide = tables["wide_tt"].native_shape()
    assert wide is not None

    def kernel(shape: TrainShape) -> TableKernel:
        if shape == wide.shape:
            raise KernelUnavailableError("this shape is too much for the compiler")
        return compile_train(shape)

    compile_train = tt_gather.kernel
    monkeypatch.setattr(tt_gather, "kernel", kernel)
    bags = make_bags(engine, 9, 2, seed=0)
    with pytest.warns(UserWarning, match="tt_gather of TrainShape.*too much for the compiler") as warned:
        ours = engine(tables, bags)
    assert len(warned) == 1
    torch.testing.assert_close(ours, plain(engine, twins, bags), rtol=1e-5, atol=1e-6)
    assert served_natively([tables[t.table] for t in engine.targets]) == [
        target.table not in ("wide_tt", "dense") for target in engine.targets
    ]


def test_without_the_driver_all_runs_on_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, tables = make_engine()
    _, twins = make_engine()

    def load(*_: object) -> None:
        raise KernelUnavailableError("no driver in this test")

    monkeypatch.setattr(native, "_unavailable", {})
    monkeypatch.setattr("recemb_kernels.digit_tree.group.load", load)
    driver.cache_clear()
    bags = make_bags(engine, 9, 2, seed=0)
    with pytest.warns(UserWarning, match="no driver in this test") as warned:
        ours = engine(tables, bags)
    assert len(warned) == 1
    torch.testing.assert_close(ours, plain(engine, twins, bags), rtol=1e-5, atol=1e-6)


def test_a_table_without_an_optimizer_leaves_its_twin_fused() -> None:
    specs = [TableSpec(name=name, num_embeddings=50, embedding_dim=8, feature_names=(name,)) for name in "ab"]
    tables = build(specs, torch.device("cpu"))
    for table in tables.values():
        table.reset_parameters()
    apply_optimizer_in_backward(torch.optim.SGD, tables["a"].parameters(), {"lr": 0.5})
    (fused,), (plain_weight,) = tables["a"].parameters(), tables["b"].parameters()
    reached: list[torch.Tensor] = []
    fused.register_hook(reached.append)
    before = fused.detach().clone()
    bags = Bags(torch.tensor([3, 4, 4, 7]), torch.arange(5), 2)
    Engine(specs)(tables, bags).sum().backward()
    assert reached == []
    moved = before.clone()
    moved[[3, 4]] -= 0.5
    assert torch.equal(fused, moved)
    assert plain_weight.grad is not None
    assert plain_weight.grad.sum() == 16


def test_an_optimizer_attached_anew_to_other_parameters_is_seen() -> None:
    _, tables = make_engine()
    table = tables["dense"]
    bags = Bags(torch.tensor([3, 4]), torch.arange(3), 1)
    for _ in range(2):
        table.weight = torch.nn.Parameter(torch.zeros(500, 16))
        apply_optimizer_in_backward(torch.optim.SGD, table.parameters(), {"lr": 1.0})
        table.pooled([table], bags).sum().backward()
        assert torch.equal(table.weight[[3, 4]].detach(), -torch.ones(2, 16))
        assert table.weight.grad is None
