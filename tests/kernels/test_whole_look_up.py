"""A look-up like the last one's is one call of C++; any other is for Python, with the same outcome."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

from recemb import EmbeddingBagCollection, EmbeddingBagConfig, TensorTrain
from recemb.backends import build
from recemb.backends.base import Backend
from recemb.bags import Bags
from recemb.engine import Engine
from recemb.errors import BatchError
from recemb.spec import ROBE, TableSpec
from tests.kernels.cases import METHODS, group_of, make_bags, make_engine, step_all, step_or_skip

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


class Kind(Tensor):
    """A tensor that may do something else."""


def _set(name: str, value: Callable[[Bags], Any]) -> Callable[[Any, Any, Bags], None]:
    return lambda engine, tables, bags: setattr(bags, name, value(bags))


def _check_ahead(engine: Engine, tables: Tables, bags: Bags) -> None:
    bags.weights, bags.checked = torch.ones(bags.ids.numel()).double(), True


def _among_others(engine: Engine, tables: Tables, bags: Bags) -> None:
    """A bad id behind as many good ones as the batch has, in memory."""
    apart = bags.ids.new_zeros(2 * bags.ids.numel())
    apart[-2:] = 10**6
    bags.ids = apart[::2]


def _replace(engine: Engine, tables: Tables, bags: Bags) -> None:
    tables["qr"] = copy.deepcopy(tables["qr"])


def _freeze(engine: Engine, tables: Tables, bags: Bags) -> None:
    tables["tt"].requires_grad_(False)


FOR_PYTHON: dict[str, Callable[[Any, Any, Bags], None]] = {
    "weights of another type": _set("weights", lambda bags: torch.ones(bags.ids.numel()).double()),
    "weights of another type, checked": _check_ahead,
    "a kind of tensor": _set("ids", lambda bags: bags.ids.as_subclass(Kind)),
    "ids that lie apart": _set("ids", lambda bags: bags.ids.repeat_interleave(2)[::2]),
    "a table in another's place": _replace,
    "a frozen table": _freeze,
}
BAD: dict[str, Callable[[Any, Any, Bags], None]] = {
    "an id without a row": _set("ids", lambda bags: bags.ids + 10**6),
    "an id without a row among others": _among_others,
    "ids of 32 bits": _set("ids", lambda bags: bags.ids.int()),
    "ids in two dimensions": _set("ids", lambda bags: bags.ids[None]),
    "ids elsewhere": _set("ids", lambda bags: bags.ids.to("meta")),
    "offsets of 32 bits": _set("offsets", lambda bags: bags.offsets.int()),
    "an offset too many": _set("offsets", lambda bags: torch.cat([bags.offsets, bags.offsets[-1:]])),
    "no offsets": _set("offsets", lambda bags: bags.offsets[:0]),
    "a weight too few": _set("weights", lambda bags: torch.ones(bags.ids.numel() - 1)),
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


@pytest.mark.parametrize("name", ["refused", "handed", "ahead", "split", "weights"])
def test_what_only_python_knows_of_a_batch_is_for_python(name: str) -> None:
    engine, tables, bags = trained()
    setattr(bags, name, [])
    assert whole(engine, tables, bags) is None
    setattr(bags, name, None)
    assert whole(engine, tables, bags) is not None


def test_no_offsets_are_no_batch_of_one_feature_either() -> None:
    step_or_skip()
    engine, tables = make_engine(methods=("tt",))
    engine(tables, make_bags(engine, 3, 1, 0))
    bags = Bags(torch.tensor([1]), torch.tensor([], dtype=torch.int64), 1)
    assert whole(engine, tables, bags) is None
    with pytest.raises(BatchError, match="offsets have 0 entries"):
        engine(tables, bags)


def test_a_prepared_batch_is_for_python() -> None:
    engine, tables, bags = trained()
    assert engine.prefetch(tables, bags)
    assert whole(engine, tables, bags) is None
    out = engine(tables, bags)
    assert bags.ahead is None
    found = whole(engine, tables, bags)  # prepared no more, but checked
    assert found is not None
    assert torch.equal(found, out)


def test_a_prepared_batch_that_cannot_be_read_gives_its_memory_back() -> None:
    engine, tables, bags = trained()
    group = group_of(tables)
    before = group.at_rest
    assert engine.prefetch(tables, bags)
    bags.weights = torch.ones(bags.ids.numel()).to_sparse()
    with pytest.raises(RuntimeError):
        engine(tables, bags)
    assert group.at_rest == before


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


def test_engines_of_the_same_tables_keep_apart() -> None:
    step_or_skip()
    torch.manual_seed(0)

    def spec(name: str, rows: int) -> TableSpec:
        return TableSpec(
            name=name,
            num_embeddings=rows,
            embedding_dim=8,
            compression=TensorTrain(rank=2),
            feature_names=("f",),
        )

    tables = build([spec("a", 50), spec("b", 50)], torch.device("cpu"))
    for table in tables.values():
        table.reset_parameters()
    own, swapped = tables, {"a": tables["b"], "b": tables["a"]}
    first, second, small = Engine([spec("a", 50)]), Engine([spec("b", 50)]), Engine([spec("a", 10)])
    bags = Bags(torch.tensor([1, 2, 49]), torch.arange(4), 1)
    few = Bags(bags.ids % 10, bags.offsets, 1)
    expected = first(own, bags)
    assert torch.equal(second(swapped, bags), expected), "the very table, by another name"
    assert torch.equal(small(own, few)[:2], expected[:2])
    for engine in (first, second):
        assert not torch.equal(engine(own if engine is second else swapped, bags), expected)
    for engine, named in ((first, own), (second, swapped)):
        assert torch.equal(engine(named, bags), expected)
        found = whole(engine, named, bags)
        assert found is not None, "they may take turns"
        assert torch.equal(found, expected)
    assert whole(small, own, few) is not None
    with pytest.raises(BatchError, match=r"id 49 is outside \[0, 10\)"):
        small(own, bags)


def test_none_is_no_table_that_is_gone() -> None:
    step_or_skip()
    specs = [
        TableSpec(
            name=name,
            num_embeddings=200,
            embedding_dim=16,
            compression=ROBE(compress_rate=5, block_size=16, group="g"),
            feature_names=(name,),
        )
        for name in ("a", "b")
    ]
    engine, tables = Engine(specs), build(specs, torch.device("cpu"))
    tables["a"].reset_parameters()
    bags, gone = make_bags(engine, 3, 1, 0), ref(tables["b"])
    engine(tables, bags)
    assert whole(engine, tables, bags) is not None
    tables["b"] = None  # type: ignore[assignment] # the other one holds the array of both
    gc.collect()
    assert gone() is None
    assert whole(engine, tables, bags) is None


def test_an_interrupt_is_not_lost() -> None:
    class Interrupted(torch.optim.SGD):
        @property
        def param_groups(self) -> Any:
            if self.__dict__.pop("asked", None):
                raise KeyboardInterrupt
            return self.groups

        @param_groups.setter
        def param_groups(self, groups: Any) -> None:
            self.groups = groups

    step_or_skip()
    engine, tables = make_engine(methods=("tt", "qr"))
    step_all(tables, Interrupted, 0.1)
    bags = make_bags(engine, 3, 1, 0)
    with torch.no_grad():
        engine(tables, bags)
        assert whole(engine, tables, bags) is not None
        next(tables["tt"].parameters())._in_backward_optimizers[0].asked = True
        with pytest.raises(KeyboardInterrupt):
            engine(tables, bags)
        assert whole(engine, tables, bags) is not None


def test_a_batch_that_cannot_be_read_leaves_nothing_behind() -> None:
    engine, tables, bags = trained()
    parameter = next(tables["tt"].parameters())
    before = sys.getrefcount(parameter)

    def look_up(ids: Tensor) -> Any:
        return whole(engine, tables, Bags(ids, bags.offsets, bags.num_features))

    for _ in range(10):
        with pytest.raises(RuntimeError, match="data"):
            torch.vmap(look_up)(bags.ids.expand(2, -1))
    assert sys.getrefcount(parameter) == before


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
