"""The whole engine through Triton's kernels on tensors of the CPU: look-ups, steps, checks of batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

from recemb.backends.native import prepare_native
from recemb.bags import Bags, LookupTarget, LookupTargets, check_on_device
from recemb.engine import Engine
from recemb.errors import BatchError, NonFiniteError
from recemb_kernels.digit_tree.group import FeatureCode
from recemb_kernels.gather_op import GatherOp
from recemb_kernels.pooled_gather import Operation, RowShape, pooled_gather
from recemb_kernels.triton_frame.group import TritonGroup
from recemb_kernels.tt_gather import TrainShape, encode, tt_gather
from tests.kernels.cases import METHODS, make_bags, make_engine
from tests.kernels.triton.graph_cases import OPTIMIZERS, Tables, gradient
from tests.kernels.triton.harness import by_triton

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="of tensors on the CPU; tests/gpu has the GPU's own"
)


def _bags(engine: Engine, seed: int, weighted: bool = False) -> Bags:
    bags = make_bags(engine, 5, 3, seed)
    if weighted:
        generator = torch.Generator().manual_seed(seed)
        bags.weights = torch.randn(bags.ids.numel(), generator=generator).requires_grad_()
    return bags


def _grad(bags: Bags) -> Tensor:
    columns = 16 * len(METHODS)
    return torch.randn(bags.batch_size, columns, generator=torch.Generator().manual_seed(0))


def _parameters(tables: Tables) -> list[torch.nn.Parameter]:
    return [parameter for table in tables.values() for parameter in table.parameters()]


def _step(engine: Engine, tables: Tables, bags: Bags) -> list[Tensor]:
    """The output, and the gradients of all that has one."""
    out = engine(tables, bags)
    out.backward(_grad(bags))
    weights = [] if bags.weights is None else [bags.weights]
    return [out.detach(), *(p.grad for p in (*_parameters(tables), *weights) if p.grad is not None)]


@pytest.mark.parametrize("weighted", [False, True])
def test_outputs_and_gradients(weighted: bool) -> None:
    engine, tables = make_engine()
    with by_triton() as groups:
        found = _step(engine, tables, _bags(engine, 1, weighted))
        with torch.no_grad():
            whole = engine(tables, _bags(engine, 1, weighted))
    # Uncompressed tables take the kernels where they have no gradient, or step.
    assert [group.num_tables for group in groups] == [len(METHODS) - 1, len(METHODS)]
    engine, tables = make_engine()
    expected = _step(engine, tables, _bags(engine, 1, weighted))
    assert len(found) == 1 + len(_parameters(tables)) + weighted
    for ours, theirs in zip([whole, *found], [expected[0], *expected], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_autocast_rounds_nothing(fused: bool) -> None:
    """Not of the kernels' own, forward or backward; what comes after them is the user's."""
    found = []
    for enabled in (False, True):
        engine, tables = make_engine()
        if fused:
            apply_optimizer_in_backward(torch.optim.Adagrad, _parameters(tables), {"lr": 0.1})
        with by_triton() as groups, torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found.append([*_step(engine, tables, _bags(engine, 1)), *_parameters(tables)])
        assert groups
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        assert torch.equal(ours, theirs)


def _trained(name: str, *, ahead: bool = False) -> Tables:
    """Tables after two fused steps."""
    engine, tables = make_engine()
    kind, settings = OPTIMIZERS[name]
    apply_optimizer_in_backward(kind, _parameters(tables), dict(settings))
    for step in range(2):
        bags = _bags(engine, step)
        if ahead:
            served = [tables[target.table] for target in engine.targets]
            bags.ahead = prepare_native(served, lambda bags=bags: bags)
            assert bags.ahead is not None
        assert len(_step(engine, tables, bags)) == 1
    return tables


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_steps(name: str) -> None:
    with by_triton() as groups:
        tables = _trained(name)
    assert [group.num_tables for group in groups] == [len(METHODS)]
    _, fresh = make_engine()
    triples = zip(*map(_parameters, (tables, _trained(name), fresh)), strict=True)
    for ours, theirs, before in triples:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert not torch.equal(ours, before)
        states = [p._in_backward_optimizers[0].state[p] for p in (ours, theirs)]
        assert states[0].keys() == states[1].keys()
        for key, value in states[0].items():
            torch.testing.assert_close(value, states[1][key], rtol=1e-4, atol=1e-5)


def test_batches_made_ready_ahead_give_the_same_bits() -> None:
    with by_triton():
        first, second = (_trained("adagrad", ahead=ahead) for ahead in (False, True))
    for ours, theirs in zip(_parameters(first), _parameters(second), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_gradient_that_is_not_finite_names_the_tables() -> None:
    engine, tables = make_engine()
    apply_optimizer_in_backward(torch.optim.SGD, _parameters(tables), {"lr": 0.1})
    before = [p.detach().clone() for p in _parameters(tables)]
    bags = _bags(engine, 4)
    grad = _grad(bags)
    grad[1, 3] = math.inf
    with by_triton():
        out = engine(tables, bags)
        with pytest.raises(
            NonFiniteError, match=r"tables tt, dense, robe.*none of their weights was changed"
        ):
            out.backward(grad)
    assert all(torch.equal(p, old) for p, old in zip(_parameters(tables), before, strict=True))


def test_the_op_of_a_bfloat16_table_gives_float32() -> None:
    shape = TrainShape((4, 5), (2, 4), (1, 8, 1))
    with FakeTensorMode():
        cores = [torch.empty(4, 16, dtype=torch.bfloat16), torch.empty(5, 32, dtype=torch.bfloat16)]
        ids, offsets = torch.empty(7, dtype=torch.int64), torch.empty(4, dtype=torch.int64)
        out = torch.ops.recemb.tt_gather(cores, ids, offsets, None, 3, encode([shape]), (0, 0, 0))
        grads, _ = torch.ops.recemb.tt_gather_backward(
            out, cores, ids, offsets, None, 3, encode([shape]), (0, 0, 0), False
        )
    assert (out.shape, out.dtype) == ((3, 8), torch.float32)
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 2


def _at_an_odd_place(parameter: Tensor) -> Tensor:
    """A contiguous view, as of a part of a flat array."""
    flat = torch.empty(1 + parameter.numel(), dtype=parameter.dtype)
    return flat[1:].view(parameter.shape).copy_(parameter)


@pytest.mark.parametrize(
    ("op", "shape", "sizes"),
    [
        (tt_gather, TrainShape((4, 5), (2, 4), (1, 8, 1)), ((4, 16), (5, 32))),
        (pooled_gather, RowShape(Operation.ADD, (4, 5), (8, 8)), ((4, 8), (5, 8))),
    ],
    ids=["tt", "qr"],
)
def test_parameters_that_kernels_could_not_read(
    op: GatherOp[Any], shape: Any, sizes: Sequence[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels read 16 bytes at once, which a GPU does at multiples of 16 alone; others are copied."""
    group = TritonGroup([(op.family(), shape)], [FeatureCode(0, False)], torch.device("cpu"), [torch.float32])
    monkeypatch.setattr(op, "_group", lambda *_: group)
    reached: list[int] = []
    for name in ("run_forward", "run_backward"):
        launches = getattr(TritonGroup, name)
        at = 0 if name == "run_forward" else 1

        def watched(
            self: TritonGroup, *args: Any, launches: Any = launches, at: int = at, **kept: Any
        ) -> Any:
            reached.extend(parameter.data_ptr() % 16 for parameter in args[at])
            return launches(self, *args, **kept)

        monkeypatch.setattr(TritonGroup, name, watched)
    generator, found = torch.Generator().manual_seed(0), []
    given = [torch.randn(size, generator=generator) for size in sizes]
    for move in (Tensor.clone, _at_an_odd_place):
        leaves = [move(p).requires_grad_() for p in given]
        ids, offsets = torch.tensor([3, 19, 3, 7]), torch.tensor([0, 1, 2, 4])
        out = op(leaves, ids, offsets, None, 3, op.encode([shape]), (0, 0, 0))
        out.backward(gradient(out))
        found.append([out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    assert all(leaf.is_contiguous() and leaf.data_ptr() % 16 for leaf in leaves)
    assert reached == [0] * (2 * 3 * len(given)), "forward, and in the backward once more, each twice"
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert len(found[0]) == 1 + len(given)


TARGETS = LookupTargets([LookupTarget("clicks", "items", 10), LookupTarget("user", "users", 4)])


def _batch(
    ids: Sequence[int] = (9, 0, 3, 3), offsets: Sequence[int] = (0, 1, 2, 3, 4), weight: float | None = None
) -> Bags:
    weights = None if weight is None else torch.tensor([1.0, 1.0, weight, 1.0])
    return Bags(torch.tensor(ids), torch.tensor(offsets), 2, weights)


@pytest.mark.parametrize(
    ("bags", "message"),
    [
        (_batch((9, 10, 3, 3)), r"'clicks' \(table 'items'\), sample 1, .*: id 10 is outside \[0, 10\)"),
        (_batch((9, 0, 3, -1)), r"'user' \(table 'users'\), sample 1, .*: id -1 is outside \[0, 4\)"),
        (_batch(offsets=(0, 1, 3, 2, 4)), r"'user' \(table 'users'\): sample 0 has length -1"),
        (_batch(offsets=(0, 1, 2, 3, 5)), "offsets run from 0 to 5 but there are 4 ids"),
        (_batch(weight=math.nan), r"'user' \(table 'users'\), sample 0, .*: weight nan is not finite"),
    ],
    ids=["large", "negative", "falling", "long", "weight"],
)
def test_the_device_refuses_a_bad_batch(bags: Bags, message: str) -> None:
    with pytest.raises(BatchError, match=f"{message}.*no kernel has stepped on it"):
        check_on_device(bags, TARGETS)
    assert bags.refused is not None
    assert bags.refused.tolist() == [1]


@pytest.mark.parametrize(
    "bags",
    [_batch(), _batch(weight=-2.0), _batch((), (0, 0, 0)), _batch((), (0,))],
    ids=["plain", "weighted", "no ids", "no samples"],
)
def test_the_device_takes_a_good_batch(bags: Bags) -> None:
    check_on_device(bags, TARGETS)
    assert bags.refused is not None
    assert bags.refused.tolist() == [0]
