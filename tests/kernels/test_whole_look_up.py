"""A look-up like the last one's is one call of C++; any other is for Python, with the same outcome."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

from recemb import EmbeddingBagCollection, EmbeddingBagConfig, TensorTrain
from recemb.backends.base import Backend
from recemb.bags import Bags
from recemb.engine import Engine
from recemb.errors import BatchError
from tests.kernels.cases import METHODS, make_bags, make_engine, step_all, step_or_skip

Tables = dict[str, Backend]


def trained(longest: int = 1) -> tuple[Engine, Tables, Bags]:
    """An engine of every method that has looked up a batch before."""
    step_or_skip()
    engine, tables = make_engine(methods=list(METHODS))
    step_all(tables, torch.optim.Adagrad, 0.1)
    engine(tables, make_bags(engine, 7, longest, 0)).sum().backward()
    return engine, tables, make_bags(engine, 9, longest, 1)


def whole(engine: Engine, tables: Any, bags: Bags) -> Tensor | None:
    known = engine._whole.get(torch.is_grad_enabled())
    return None if known is None else known(tables, bags)


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("longest", [1, 4])
def test_it_is_what_python_makes(
    grad: Callable[[], AbstractContextManager[None]], weighted: bool, longest: int
) -> None:
    engine, tables, bags = trained(longest)
    if weighted:
        bags.weights = torch.linspace(-1, 1, bags.ids.numel())
    with grad():
        expected = engine._look_up(tables, bags)
        found = whole(engine, tables, bags)
    assert found is not None
    assert torch.equal(found, expected)
    assert found.requires_grad == expected.requires_grad == (grad is torch.enable_grad)


def test_modules_are_found_by_name_too() -> None:
    engine, tables, bags = trained()
    modules = nn.ModuleDict(tables)
    assert whole(engine, modules, bags) is None  # so far they were in a dict
    other = Engine([table.table for table in tables.values()])
    expected = other(modules, bags)
    found = whole(other, modules, bags)
    assert found is not None
    assert torch.equal(found, expected)


class Other(Bags):
    """Bags that may mean something else."""


def _set(name: str, value: Callable[[Bags], Any]) -> Callable[[Any, Any, Bags], None]:
    return lambda engine, tables, bags: setattr(bags, name, value(bags))


def _replace(engine: Engine, tables: Tables, bags: Bags) -> None:
    tables["qr"] = copy.deepcopy(tables["qr"])


def _freeze(engine: Engine, tables: Tables, bags: Bags) -> None:
    tables["tt"].requires_grad_(False)


FOR_PYTHON: dict[str, Callable[[Any, Any, Bags], None]] = {
    "weights of another type": _set("weights", lambda bags: torch.ones(bags.ids.numel()).double()),
    "ids that lie apart": _set("ids", lambda bags: bags.ids.repeat_interleave(2)[::2]),
    "a table in another's place": _replace,
    "a frozen table": _freeze,
}
BAD: dict[str, Callable[[Any, Any, Bags], None]] = {
    "an id without a row": _set("ids", lambda bags: bags.ids + 10**6),
    "ids of 32 bits": _set("ids", lambda bags: bags.ids.int()),
    "offsets that fall": _set("offsets", lambda bags: bags.offsets.flip(0)),
    "too few features": _set("num_features", lambda bags: bags.num_features - 1),
    "weights that are not finite": _set("weights", lambda bags: torch.full(bags.ids.shape, torch.inf)),
}


@pytest.mark.parametrize("change", FOR_PYTHON.values(), ids=FOR_PYTHON)
def test_what_is_for_python(change: Callable[[Any, Any, Bags], None]) -> None:
    engine, tables, bags = trained()
    change(engine, tables, bags)
    assert whole(engine, tables, bags) is None
    assert torch.equal(engine(tables, bags), engine._look_up(tables, bags))


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_what_is_wrong_is_said(change: Callable[[Any, Any, Bags], None]) -> None:
    engine, tables, bags = trained()
    before = [parameter.detach().clone() for table in tables.values() for parameter in table.parameters()]
    change(engine, tables, bags)
    assert whole(engine, tables, bags) is None
    with pytest.raises(BatchError):
        engine(tables, bags)
    after = [parameter for table in tables.values() for parameter in table.parameters()]
    assert all(map(torch.equal, before, after))


def test_other_kinds_of_tables_and_bags_are_for_python() -> None:
    engine, tables, bags = trained()
    assert whole(engine, MappingProxyType(tables), bags) is None
    assert whole(engine, tables, Other(bags.ids, bags.offsets, bags.num_features)) is None
    assert torch.equal(engine(MappingProxyType(tables), bags), engine(tables, bags))  # type: ignore[arg-type]


def test_a_prepared_batch_is_for_python() -> None:
    engine, tables, bags = trained()
    assert engine.prefetch(tables, bags)
    assert whole(engine, tables, bags) is None
    out = engine(tables, bags)
    assert bags.ahead is None
    found = whole(engine, tables, bags)  # prepared no more, but checked
    assert found is not None
    assert torch.equal(found, out)


@contextmanager
def _eagerly_compiled() -> Iterator[None]:
    with compiled_autograd._enable(lambda graph: graph):
        yield


def test_compiled_autograd_is_for_python() -> None:
    engine, tables, bags = trained()
    for around, there in ((_eagerly_compiled(), False), (nullcontext(), True)):
        with around:
            assert (whole(engine, tables, bags) is not None) == there


def test_what_has_changed_for_one_look_up_is_seen_by_the_next() -> None:
    engine, tables, bags = trained()
    with torch.no_grad():
        assert whole(engine, tables, bags) is None
        engine(tables, bags)
        assert whole(engine, tables, bags) is not None
    found = whole(engine, tables, bags)
    assert found is not None, "the one of training is as it was"
    assert found.requires_grad
    _freeze(engine, tables, bags)
    assert whole(engine, tables, bags) is None
    engine(tables, bags)
    assert whole(engine, tables, bags) is not None
    with torch.no_grad():
        assert whole(engine, tables, bags) is None, "and so have both"


def test_copies_find_their_own_tables() -> None:
    step_or_skip()
    config = EmbeddingBagConfig(
        name="t", num_embeddings=50, embedding_dim=8, feature_names=["f"], compression=TensorTrain(rank=2)
    )
    made = EmbeddingBagCollection(tables=[config])
    bags = Bags(torch.tensor([1, 2, 49]), torch.arange(4), 1)

    def look_up(collection: EmbeddingBagCollection) -> Tensor:
        return collection._engine(collection.embedding_bags, bags)

    expected = look_up(made)
    assert whole(made._engine, made.embedding_bags, bags) is not None
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert not copied._engine._whole
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(2)
        assert torch.equal(look_up(copied), 8 * expected)
        assert whole(made._engine, copied.embedding_bags, bags) is None
    assert torch.equal(look_up(made), expected)


def test_many_threads_at_once() -> None:
    engine, tables, _ = trained()
    batches = [make_bags(engine, size, 3, size) for size in range(1, 17)]
    with torch.no_grad():
        expected = [engine._look_up(tables, bags) for bags in batches]

    def look_up(bags: Bags) -> Tensor:
        with torch.no_grad():
            return engine(tables, bags)

    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(look_up, batches), expected))
