"""Tensor-train tables on the device, against float64, plain torch and the CPU kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from recemb.id_maps.radix import mixed_radix
from recemb_kernels.digit_tree.group import Batch, FeatureCode
from recemb_kernels.triton_frame.verdict import poll
from recemb_kernels.tt_gather import TrainShape, tt_gather
from recemb_kernels.update import Kind
from tests.kernels.triton.harness import (
    DEVICE,
    DTYPES,
    Case,
    NoHostSync,
    assert_error_law,
    by_torch,
    on_device,
    poisoned,
    run,
    run_on_cpu,
    triton_group,
)

# Two families: two tables of one (q, R) with different p, and a third of another order.
SHAPES = (
    TrainShape((9, 8, 7), (2, 2, 4), (1, 16, 8, 1)),
    TrainShape((21, 24), (2, 4), (1, 8, 1)),
    TrainShape((5, 4, 11), (2, 2, 4), (1, 16, 8, 1)),
)


def make_case(
    shapes: Sequence[TrainShape] = SHAPES,
    features: Sequence[FeatureCode] | None = None,
    batch: int = 12,
    longest: int = 3,
    weighted: bool = False,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    codes = [FeatureCode(t, t == 1) for t in range(len(shapes))] if features is None else features
    parameters = []
    for shape in shapes:
        bonds = zip(shape.row_shape, shape.dim_shape, shape.ranks, shape.ranks[1:], strict=False)
        # Rows of deviation 1, whatever the ranks.
        std = math.prod(shape.ranks) ** (-0.5 / len(shape.row_shape))
        parameters += [torch.randn(p, r * q * s, generator=generator) * std for p, q, r, s in bonds]
    lengths = torch.randint(0, longest + 1, (len(codes) * batch,), generator=generator)
    ids = []
    for code, own in zip(codes, lengths.split(batch) if batch else [lengths] * len(codes), strict=True):
        rows = math.prod(shapes[code.table].row_shape)
        # Squared, so that some rows come often.
        ids.append((torch.rand(int(own.sum()), generator=generator) ** 2 * rows).long())
    joined = torch.cat(ids)
    weights = torch.rand(joined.numel(), generator=generator) if weighted else None
    columns = sum(shapes[code.table].dim for code in codes)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    grad_out = torch.randn(batch, columns, generator=generator)
    return Case(tt_gather, shapes, codes, parameters, Batch(joined, offsets, weights, batch), grad_out)


def rows_of(case: Case) -> Callable[[int, list[Tensor], Tensor], Tensor]:
    def rows(table: int, cores: list[Tensor], keys: Tensor) -> Tensor:
        shape = case.shapes[table]
        slots = mixed_radix(keys, shape.row_shape)
        product = cores[0][slots[:, 0]].view(len(keys), shape.dim_shape[0], shape.ranks[1])
        for k in range(1, len(cores)):
            core = cores[k][slots[:, k]].view(
                len(keys), shape.ranks[k], shape.dim_shape[k] * shape.ranks[k + 1]
            )
            product = (product @ core).view(
                len(keys), math.prod(shape.dim_shape[: k + 1]), shape.ranks[k + 1]
            )
        return product.squeeze(2)

    return rows


def check(case: Case, dtype: torch.dtype, micro_batch_rows: int = 2**15) -> None:
    case = case.rounded(dtype)
    exact = by_torch(case, rows_of(case), torch.float64)
    with poisoned():
        found, parameters = run(case, dtype, micro_batch_rows)
    assert_error_law(found, by_torch(case, rows_of(case), dtype), exact)
    assert all(torch.equal(p, q.to(dtype)) for p, q in zip(parameters, case.parameters, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_error_law(dtype: torch.dtype, weighted: bool) -> None:
    check(make_case(weighted=weighted), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        TrainShape((30, 20), (1, 3), (1, 4, 1)),
        TrainShape((6, 5, 7), (4, 4, 8), (1, 128, 64, 1)),
        TrainShape((4, 3, 5, 3), (2, 2, 2, 2), (1, 4, 8, 4, 1)),
        TrainShape((7, 1, 9), (1, 1, 1), (1, 1, 3, 1)),
        TrainShape((7, 6, 5), (3, 5, 1), (1, 13, 11, 1)),
    ],
    ids=lambda s: "x".join(map(str, s.ranks)),
)
def test_ranks_orders_and_odd_sizes(shape: TrainShape, dtype: torch.dtype) -> None:
    check(make_case([shape], batch=8, longest=2, seed=1), dtype)


@settings(derandomize=True, deadline=None, max_examples=12, phases=[Phase.generate])
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    order = data.draw(st.integers(2, 4))
    sizes = st.integers(1, 6)
    draw = [tuple(data.draw(sizes) for _ in range(n)) for n in (order, order, order - 1)]
    if math.prod(draw[1]) > 64:
        draw[1] = (2,) * order
    shape = TrainShape(draw[0], draw[1], (1, *draw[2], 1))
    case = make_case(
        [shape, SHAPES[0]],
        [FeatureCode(0, data.draw(st.booleans())), FeatureCode(1, False), FeatureCode(0, False)],
        batch=data.draw(st.integers(1, 9)),
        longest=data.draw(st.integers(0, 4)),
        weighted=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 2**20)),
    )
    check(case, torch.float32, data.draw(st.sampled_from([1, 5, 2**15])))


@pytest.mark.parametrize("kind", [Kind.SGD, Kind.ADAGRAD, Kind.ROWWISE_ADAGRAD, Kind.ADAM])
def test_steps_are_those_of_the_cpu(kind: Kind) -> None:
    case = make_case()
    ours, theirs = case.updates(kind, DEVICE), case.updates(kind, torch.device("cpu"))
    (out, *_), parameters = run(case, updates=ours)
    (expected, *_), stepped = run_on_cpu(case, theirs)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(p, q) for p, q in zip(parameters, case.parameters, strict=True))
    for mine, cpu in zip(parameters, stepped, strict=True):
        torch.testing.assert_close(mine, cpu, rtol=1e-4, atol=1e-5)
    for mine, cpu in zip(ours, theirs, strict=True):
        assert mine is not None
        assert cpu is not None
        for name in ("state", "state2", "steps"):
            for a, b in zip(getattr(mine, name), getattr(cpu, name), strict=True):
                torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)


def test_tables_with_their_own_rates_and_without() -> None:
    """Different rules in one family: each table takes its own, and the last gives gradients."""
    case = make_case()
    ours, theirs = ([*case.updates(Kind.ADAGRAD, d)[:2], None] for d in (DEVICE, torch.device("cpu")))
    for updates in (ours, theirs):
        assert updates[0] is not None
        updates[0].lr = 0.3
    found, parameters = run(case, updates=ours)
    expected, stepped = run_on_cpu(case, theirs)
    assert len(found) == len(expected) == 1 + 3
    for a, b in zip([*found, *parameters], [*expected, *stepped], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_half_precision_steps_in_float32() -> None:
    case = make_case().rounded(torch.bfloat16)
    _, parameters = run(case, torch.bfloat16, updates=case.updates(Kind.ADAGRAD, DEVICE))
    _, exact = run_on_cpu(case, case.updates(Kind.ADAGRAD, torch.device("cpu")))
    for mine, cpu in zip(parameters, exact, strict=True):
        torch.testing.assert_close(mine.float(), cpu, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("rows", [1, 4, 17])
def test_micro_batches_give_the_bits_of_the_whole(rows: int) -> None:
    case = make_case(batch=20, weighted=True)
    whole, _ = run(case)
    sliced, _ = run(case, micro_batch_rows=rows)
    assert torch.equal(whole[0], sliced[0])
    assert torch.equal(whole[-1], sliced[-1]), "gradients of the weights"
    # A core slice sums over the same nodes in another order.
    for first, second in zip(whole[1:-1], sliced[1:-1], strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=2e-5)


def test_two_runs_give_the_same_bits() -> None:
    case = make_case(batch=30, weighted=True)
    first, second = run(case)[0], run(case)[0]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_long_runs_of_one_row() -> None:
    """One row more often than a piece holds, in two features."""
    case = make_case(SHAPES[:1], [FeatureCode(0, False), FeatureCode(0, True)], batch=150, longest=1)
    case.batch.ids.fill_(5)
    check(case, torch.float32)


@pytest.mark.parametrize(("batch", "longest"), [(0, 1), (4, 0)])
def test_no_ids(batch: int, longest: int) -> None:
    case = make_case(batch=batch, longest=longest)
    (out, *grads), _ = run(case)
    assert torch.equal(out, torch.zeros(batch, sum(s.dim for s in SHAPES)))
    assert all(torch.equal(g, torch.zeros_like(p)) for g, p in zip(grads, case.parameters, strict=True))


def test_ids_without_a_row_are_skipped() -> None:
    """Negative ones mean that; others are refused by the check, and must not be read before that."""
    case = make_case(batch=16, longest=2, weighted=True)
    bad = torch.arange(case.batch.ids.numel()) % 3 == 0
    assert case.batch.weights is not None
    weights = case.batch.weights.masked_fill(bad, 0)
    silent = replace(case, batch=replace(case.batch, ids=case.batch.ids.clone(), weights=weights))
    case.batch.ids[bad] = torch.where(torch.arange(int(bad.sum())) % 2 == 0, -1, 2**40)
    found, expected = run(case)[0], run(silent)[0]
    for a, b in zip(found[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not found[-1][bad].any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float) -> None:
    case = make_case()
    case.grad_out[3, 5] = value
    updates = case.updates(Kind.ADAGRAD, DEVICE)
    group, batch = triton_group(case), on_device(case.batch)
    parameters = [p.to(DEVICE, copy=True) for p in case.parameters]
    _, state = group.forward(parameters, batch, keep=True)
    asked = {"updates": updates, "wanted": [True] * len(parameters), "want_weights": False}

    def step() -> None:
        group.backward(case.grad_out.to(DEVICE), parameters, batch, state, **asked)
        poll(wait=True)

    with pytest.raises(FloatingPointError, match="no weight was changed"):
        step()
    assert all(torch.equal(p.cpu(), q) for p, q in zip(parameters, case.parameters, strict=True))


def test_a_refused_batch_changes_nothing() -> None:
    case = make_case()
    group, parameters = triton_group(case), [p.to(DEVICE, copy=True) for p in case.parameters]
    batch = replace(on_device(case.batch), refused=torch.ones(1, dtype=torch.int32, device=DEVICE))
    _, state = group.forward(parameters, batch, keep=True)
    asked = {"updates": case.updates(Kind.SGD, DEVICE), "wanted": [True] * len(parameters)}
    group.backward(case.grad_out.to(DEVICE), parameters, batch, state, want_weights=False, **asked)
    assert all(torch.equal(p.cpu(), q) for p, q in zip(parameters, case.parameters, strict=True))


def test_a_step_never_waits_for_the_device() -> None:
    case = make_case(weighted=True)
    group, parameters = triton_group(case, micro_batch_rows=7), [p.to(DEVICE) for p in case.parameters]
    batch, grad_out = on_device(case.batch), case.grad_out.to(DEVICE)
    asked = {"updates": [None] * 3, "wanted": [True] * len(parameters), "want_weights": True}

    def step() -> None:
        _, state = group.forward(parameters, batch, keep=True)
        group.backward(grad_out, parameters, batch, state, **asked)

    step()  # descriptors are copied there once
    with NoHostSync():
        step()
    with pytest.raises(AssertionError, match="waits"), NoHostSync():
        batch.ids.unique()


def test_more_rows_than_an_int32_counts() -> None:
    shape = TrainShape((2**14, 2**10, 2**10), (2, 1, 2), (1, 2, 2, 1))
    case = make_case([shape], batch=6, longest=2)
    case.batch.ids[:3] = torch.tensor([2**34 - 1, 2**31, 2**33 + 5])
    check(case, torch.float32)
