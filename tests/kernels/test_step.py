"""A look-up that trains in C++ does what one from Python does, and sees what has changed of its tables."""

from __future__ import annotations

import gc
import sysconfig
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import ref

import pytest
import torch
import torchrec
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from recemb.backends.base import Backend
from recemb.bags import Bags
from recemb.engine import Engine
from recemb.errors import ConfigError, NonFiniteError
from recemb_kernels import native
from recemb_kernels.digit_tree import step
from recemb_kernels.lookup import Lookup
from tests.kernels.cases import METHODS, make_bags, make_engine, settings_of, step_all, step_or_skip

OPTIMIZERS = (
    torch.optim.SGD,
    torch.optim.Adagrad,
    torchrec.optim.RowWiseAdagrad,
    torch.optim.Adam,
)


@pytest.fixture(params=["C++", "Python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By which way look-ups of this test train."""
    if request.param == "Python":
        from_python(monkeypatch)
    else:
        step_or_skip()
    return str(request.param)


def from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lookup, "_in_cpp", lambda *_: None)


def name_of(out: Tensor) -> str:
    assert out.grad_fn is not None
    return out.grad_fn.name()


def outcome(
    kind: type[torch.optim.Optimizer] | None, longest: int, weighted: bool, steps: int = 3
) -> tuple[str, list[Tensor]]:
    """The node's name, and all that training for some steps makes and changes."""
    methods = [name for name in METHODS if kind is not None or name not in ("dense", "md")]
    engine, tables = make_engine(methods=methods)
    if kind is not None:
        step_all(tables, kind, 0.1)
        # One that is frozen, and one whose gradient is written out beside steps.
        tables["qr"].requires_grad_(False)
        next(tables["tt"].parameters())._in_backward_optimizers = []
    found, name = [], ""
    for seed in range(steps):
        bags = make_bags(engine, 37, longest, seed)
        if weighted:
            bags.weights = torch.rand(bags.ids.numel(), generator=torch.Generator().manual_seed(seed))
            bags.weights.requires_grad_()
        out = engine(tables, bags)
        name = name_of(out)
        # Not contiguous, as of a part of what an interaction takes.
        torch.cat([out, out], dim=1).square()[:, 1:-1].sum().backward()
        found += [out.detach()] + ([] if bags.weights is None else [bags.weights.grad])
    for table in tables.values():
        for parameter in table.parameters():
            found += [parameter.detach(), parameter.grad]
            for optimizer in getattr(parameter, "_in_backward_optimizers", []):
                found += optimizer.state[parameter].values()
    return name, [tensor for tensor in found if tensor is not None]


@pytest.mark.parametrize("kind", [None, *OPTIMIZERS])
@pytest.mark.parametrize("longest", [1, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_both_ways_give_the_same_bits(
    kind: type[torch.optim.Optimizer] | None,
    longest: int,
    weighted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step_or_skip()
    name, compiled = outcome(kind, longest, weighted)
    assert name == "PooledLookup"
    from_python(monkeypatch)
    name, python = outcome(kind, longest, weighted)
    assert name == "_PoolBackward"
    assert len(compiled) == len(python) > 6
    assert all(torch.equal(a, b) for a, b in zip(compiled, python, strict=True))


def trained(
    kind: type[torch.optim.Optimizer] = torch.optim.Adagrad,
) -> tuple[Engine, dict[str, Backend], Bags]:
    engine, tables = make_engine(methods=("tt", "qr"))
    step_all(tables, kind, 0.1)
    return engine, tables, make_bags(engine, 9, 3, seed=1)


def values_of(tables: dict[str, Backend]) -> list[Tensor]:
    return [parameter.detach().clone() for table in tables.values() for parameter in table.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_gradient_that_is_not_finite_is_refused(way: str) -> None:
    engine, tables, bags = trained()
    before, out = values_of(tables), engine(tables, bags)
    with pytest.raises(NonFiniteError, match="of tables tt, qr is NaN or infinite") as raised:
        out.backward(torch.full_like(out, torch.nan), retain_graph=True)
    assert raised.value.__cause__ is None
    assert same(before, values_of(tables))
    out.sum().backward()
    assert not same(before, values_of(tables))


def test_an_optimizer_that_cannot_step_changes_nothing(way: str) -> None:
    engine, tables, bags = trained()
    before, out = values_of(tables), engine(tables, bags)
    parameter = next(tables["qr"].parameters())
    parameter._in_backward_optimizers[0].state[parameter]["sum"] = torch.zeros(1)
    with pytest.raises(ConfigError, match="state 'sum'"):
        out.sum().backward()
    assert same(before, values_of(tables))


def test_what_the_backward_reads_again_may_not_have_changed(way: str) -> None:
    engine, tables, bags = trained()
    next(tables["tt"].parameters())._in_backward_optimizers = []
    out = engine(tables, bags)
    with torch.no_grad():
        next(tables["tt"].parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    out = engine(tables, bags)
    bags.ids.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_settings_that_come_apart_before_the_backward_are_refused(way: str) -> None:
    engine, tables, bags = trained()
    before, out = values_of(tables), engine(tables, bags)
    settings_of(next(tables["tt"].parameters()))["lr"] = 0.0
    with pytest.raises(ConfigError, match="a table's parameters step together"):
        out.sum().backward()
    assert same(before, values_of(tables))


def test_rates_are_watched_beside_one_that_nobody_steps_by(way: str) -> None:
    engine, tables, bags = trained(torch.optim.SGD)
    first, second, third = tables["tt"].parameters()
    third.requires_grad_(False)
    settings_of(third)["lr"] = 0.5
    engine(tables, bags).sum().backward()
    settings_of(second)["lr"] = 0.0
    before = values_of(tables)
    engine(tables, bags).square().sum().backward()
    assert torch.equal(second, before[1])
    assert not torch.equal(first, before[0])


@pytest.mark.parametrize("what", ["parameter", "size", "state"])
def test_memory_that_is_not_what_it_was_is_not_written_to(way: str, what: str) -> None:
    engine, tables, bags = trained()
    out = engine(tables, bags)
    parameter = next(tables["tt"].parameters())
    state = parameter._in_backward_optimizers[0].state[parameter]
    out.sum().backward(retain_graph=True)
    if what == "parameter":
        parameter.data = parameter.data.half()
    elif what == "size":
        parameter.data = parameter.data[:-1].clone()
    else:
        state["sum"].data = state["sum"].data.double()
    before = values_of(tables)
    with pytest.raises(ConfigError, match=r"tables tt, qr: .* another type, size or layout than at"):
        out.sum().backward()
    assert same(before, values_of(tables))


def _cut(state: Tensor) -> None:
    state.data = state.data[:1].clone()


STATES: dict[str, Callable[[Tensor, dict[str, Tensor]], None]] = {
    "rows": lambda parameter, state: _cut(state["sum"]),
    "counter": lambda parameter, state: setattr(state["step"], "data", torch.zeros(0)),
    "both": lambda parameter, state: (_cut(parameter), _cut(state["sum"]))[0],
    "shape": lambda parameter, state: setattr(parameter, "data", parameter.data.reshape(1, -1)),
}


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torchrec.optim.RowWiseAdagrad])
@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
def test_kernels_do_not_step_beyond_a_state(
    way: str, change: Callable[[Tensor, dict[str, Tensor]], None], kind: type[torch.optim.Optimizer]
) -> None:
    engine, tables, bags = trained(kind)
    out = engine(tables, bags)
    parameter = next(tables["tt"].parameters())
    out.sum().backward(retain_graph=True)
    change(parameter, parameter._in_backward_optimizers[0].state[parameter])
    before = values_of(tables)
    with pytest.raises(ConfigError, match=r"tables tt, qr: .* another type, size or layout than at"):
        out.sum().backward()
    assert same(before, values_of(tables))


@pytest.mark.parametrize("later", [False, True])
def test_a_parameter_whose_memory_is_given_away_is_refused(way: str, later: bool) -> None:
    engine, tables, bags = trained()
    engine(tables, bags).sum().backward()
    out = engine(tables, bags).sum()
    others = values_of({"qr": tables["qr"]})
    next(tables["tt"].parameters()).untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"the memory of a parameter .*has been given away"):
        out.backward() if later else engine(tables, bags)
    assert same(others, values_of({"qr": tables["qr"]}))


@pytest.mark.parametrize("grad", [torch.ones(3), torch.ones(9, 32).t(), torch.ones(9, 33)])
def test_a_node_that_is_called_by_itself_refuses_other_shapes(grad: Tensor) -> None:
    step_or_skip()
    engine, tables, bags = trained()
    before, out = values_of(tables), engine(tables, bags)
    node: Any = out.grad_fn
    with pytest.raises(RuntimeError, match=r"shape \[9, 32\] was given a gradient of shape"):
        node(grad)
    assert same(before, values_of(tables))
    node(torch.ones(9, 32))
    assert not same(before, values_of(tables))


def test_a_sparse_gradient_is_taken(way: str) -> None:
    results = []
    for sparse in (True, False):
        engine, tables, bags = trained()
        rows = torch.tensor([0, 3, 3])
        torch.nn.functional.embedding(rows, engine(tables, bags), sparse=sparse).sum().backward()
        results.append(values_of(tables))
    assert same(*results)


def test_two_threads_may_go_back_at_once(way: str) -> None:
    engine, tables, bags = trained()
    out = engine(tables, bags).sum()
    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            list(pool.map(lambda _: out.backward(retain_graph=True), range(2)))
    assert all(bool(torch.isfinite(value).all()) for value in values_of(tables))


def test_no_gradient_is_a_gradient_of_zeros(way: str) -> None:
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: Tensor) -> Tensor:
            return rows.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return None

    engine, tables, bags = trained(torch.optim.Adam)
    engine(tables, bags).sum().backward()
    before = values_of(tables)
    Nothing.apply(engine(tables, bags)).sum().backward()  # type: ignore[no-untyped-call]
    assert not same(before, values_of(tables)), "Adam's momentum moves the rows of the batch on"


@pytest.mark.parametrize("contiguous", [False, True])
def test_a_negated_view_is_read_as_what_it_says(way: str, contiguous: bool) -> None:
    engine, tables, bags = trained(torch.optim.SGD)
    twin, others, _ = trained(torch.optim.SGD)
    out = engine(tables, bags)
    upstream = torch.view_as_complex(torch.randn(*out.shape, 2)).conj().imag
    if contiguous:
        upstream = torch._neg_view(torch.randn(out.shape))
    assert upstream.is_neg()
    assert upstream.is_contiguous() == contiguous
    out.backward(upstream)
    twin(others, bags).backward(upstream.clone().resolve_neg())
    assert same(values_of(tables), values_of(others))


def test_weights_may_be_a_negated_view(way: str) -> None:
    found = []
    for resolve in (False, True):
        engine, tables, _ = trained()
        # Of one, which is contiguous whatever its stride.
        weights = torch.view_as_complex(torch.ones(1, 2)).conj().imag
        assert weights.is_neg()
        assert weights.is_contiguous()
        bags = Bags(torch.tensor([1]), torch.tensor([0, 1, 1]), 2, weights.clone() if resolve else weights)
        engine(tables, bags).sum().backward()
        found.append(values_of(tables))
    assert same(*found)


def test_a_look_up_has_no_forward_mode(way: str) -> None:
    engine, tables, bags = trained()
    bags.weights = torch.rand(bags.ids.numel())
    with forward_ad.dual_level():
        bags.weights = forward_ad.make_dual(bags.weights, torch.rand(bags.ids.numel()))
        with pytest.raises(RuntimeError, match="forward"):
            engine(tables, bags)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_look_up_may_be_done_again_in_the_backward(way: str, reentrant: bool) -> None:
    results = []
    for checkpointed in (False, True):
        engine, tables, bags = trained()
        gain = torch.ones((), requires_grad=True)

        def forward(gain: Tensor) -> Tensor:
            return engine(tables, bags) * gain  # noqa: B023 # called in this iteration

        out = checkpoint(forward, gain, use_reentrant=reentrant) if checkpointed else forward(gain)
        out.square().sum().backward()
        results.append([out.detach(), gain.grad, *values_of(tables)])
    assert same(*results)


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_autograd_takes_look_ups_that_are_made_in_it(whole: bool) -> None:
    step_or_skip()
    outcomes = []
    for compiled in (False, True):
        engine, tables, bags = trained()
        enabled = compiled_autograd._enable(torch.compile(backend="eager")) if compiled else nullcontext()
        if not (whole and compiled):
            out = engine(tables, bags)
        with enabled:
            if whole and compiled:
                out = engine(tables, bags)
            elif compiled:
                with pytest.raises(NotImplementedError, match="enable it around the forward as well"):
                    out.square().sum().backward()
                return
            out.square().sum().backward()
        outcomes.append([out.detach(), *values_of(tables)])
    assert same(*outcomes)


def test_saved_tensors_may_be_kept_elsewhere(way: str) -> None:
    engine, tables = make_engine(methods=("tt", "qr"))
    bags = make_bags(engine, 9, 3, seed=1)
    seen: list[Tensor] = []

    def keep(tensor: Tensor) -> int:
        seen.append(tensor)
        return len(seen) - 1

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda at: seen[at]):
        out = engine(tables, bags)
    assert len(seen) == 2 + sum(len(list(table.parameters())) for table in tables.values())
    out.sum().backward()


@pytest.mark.parametrize("strict", [False, True])
def test_anomalies_are_looked_for(way: str, strict: bool) -> None:
    engine, tables, bags = trained()
    watching: AbstractContextManager[Any] = nullcontext()
    if strict:
        watching = warnings.catch_warnings(action="ignore")
    with watching, torch.autograd.set_detect_anomaly(strict):
        out = engine(tables, bags)
        with pytest.raises(NonFiniteError):
            out.backward(torch.full_like(out, torch.inf))


def test_tables_go_when_nobody_holds_them(way: str) -> None:
    engine, tables, bags = trained()
    module = nn.ModuleDict(tables)
    module.last = engine(tables, bags)  # type: ignore[assignment] # a loss that nobody goes back from
    engine(tables, bags).sum().backward()
    gone = [ref(table) for table in tables.values()]
    del module.last, module, tables, engine
    gc.collect()
    assert [table() for table in gone] == [None, None]


def test_without_headers_of_python_steps_are_taken_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    step_or_skip()
    engine, tables, bags = trained()
    assert native.status()[native.STEP].startswith("native CPU")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "/nowhere")
    monkeypatch.setattr(native, "_unavailable", {})
    step.step_module.cache_clear()
    try:
        with pytest.warns(UserWarning, match="from Python, which is slower: there is no /nowhere/Python.h"):
            out = engine(tables, bags)
        assert name_of(out) == "_PoolBackward"
        assert native.status()[native.STEP].startswith("steps are taken from Python: there is no /nowhere")
    finally:
        monkeypatch.undo()
        step.step_module.cache_clear()
        step.step_module()
