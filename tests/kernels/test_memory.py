"""A look-up that finds no memory is an error that can be lived with: nothing has changed, and all goes on."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from recemb.backends.base import Backend
from recemb.backends.native import pooled_native
from recemb.bags import Bags
from recemb.cache.hot_rows import HotRowCache
from recemb.engine import Engine
from recemb.errors import OutOfMemoryError
from recemb.spec import HotRows, QuotientRemainder
from recemb_kernels import cache_split
from recemb_kernels.cache_split import Parts
from recemb_kernels.digit_tree.group import driver
from tests.cache.cases import spec
from tests.kernels.cases import make_bags, make_engine, step_all
from tests.kernels.test_lookup import poisoned as poisoned

SITES = 40  # more than there are


@pytest.fixture(autouse=True)
def _fails_no_more() -> Iterator[None]:
    yield
    driver().recemb_tree_fail(0)
    cache_split.library().recemb_split_fail(0)


def state_of(tables: dict[str, Backend]) -> list[Tensor]:
    """All that a step changes."""
    found: list[Tensor] = []
    for table in tables.values():
        for parameter in table.parameters():
            (optimizer,) = parameter._in_backward_optimizers
            found += [parameter.detach(), *optimizer.state[parameter].values()]
    return copy.deepcopy(found)


def one_step(
    kind: type[torch.optim.Optimizer],
    batch: Callable[[Engine], Bags],
    fail: int,
    micro_batch_rows: int | None,
) -> tuple[list[tuple[str, str]], list[Tensor]]:
    """Train for a step, memory being short at growth number ``fail``: where, what it said, the outcome."""
    engine, tables = make_engine()
    step_all(tables, kind, 0.1)
    bags = batch(engine)
    served = [tables[target.table] for target in engine.targets]
    # Optimizers make their states in a step; it is another group's, so that no memory is there yet.
    warm = pooled_native(served, make_bags(engine, 3, 1, seed=5), 9999)
    assert warm is not None
    warm.sum().backward()
    met: list[tuple[str, str]] = []

    def going_on(place: str, call: Callable[[], Any]) -> Any:
        before = state_of(tables)
        try:
            return call()
        except OutOfMemoryError as error:
            met.append((place, str(error)))
        assert all(torch.equal(a, b) for a, b in zip(before, state_of(tables), strict=True))
        return call()

    driver().recemb_tree_fail(fail)
    out = going_on("forward", lambda: pooled_native(served, bags, micro_batch_rows))
    loss = out.square().sum()
    going_on("backward", lambda: loss.backward(retain_graph=True))
    return met, [out.detach(), *state_of(tables)]


@pytest.mark.parametrize(
    ("kind", "size", "longest", "weighted", "micro_batch_rows"),
    [
        (torch.optim.Adam, 100, 1, False, None),  # by several threads
        (torch.optim.Adam, 30, 4, True, 20),
        (torch.optim.Adagrad, 30, 4, True, None),
        (torch.optim.Adagrad, 30, 4, False, 20),
    ],
)
def test_memory_that_is_short_anywhere_changes_nothing(
    kind: type[torch.optim.Optimizer],
    size: int,
    longest: int,
    weighted: bool,
    micro_batch_rows: int | None,
    poisoned: None,
) -> None:
    def batch(engine: Engine) -> Bags:
        bags = make_bags(engine, size, longest, seed=1)
        if weighted:
            bags.weights = torch.rand(bags.ids.numel(), generator=torch.Generator().manual_seed(2))
        return bags

    met, expected = one_step(kind, batch, 0, micro_batch_rows)
    assert not met
    seen: list[tuple[str, str]] = []
    for fail in range(1, SITES):
        met, outcome = one_step(kind, batch, fail, micro_batch_rows)
        for found, right in zip(outcome, expected, strict=True):
            assert torch.equal(found, right)
        if not met:
            break
        seen += met
    assert fail < SITES - 1
    assert all("tables tt, dense" in said and "a smaller batch" in said for _, said in seen)
    places = [place for place, _ in seen]
    assert places == sorted(places, reverse=True), "every growth of the forward, then those of the backward"
    assert places.count("forward") >= 9
    # Of several ids a bag the forward holds the rows, which leaves room enough.
    assert places.count("backward") >= (longest == 1)


def test_memory_that_is_short_while_a_batch_is_prepared() -> None:
    met = 0
    for fail in range(1, SITES):
        engine, tables = make_engine()
        bags = make_bags(engine, 40, 4, seed=1)
        with torch.no_grad():
            expected = engine(tables, make_bags(engine, 40, 4, seed=1))
        engine, tables = make_engine()
        driver().recemb_tree_fail(fail)
        engine.prefetch(tables, bags)
        with torch.no_grad():
            try:
                found = engine(tables, bags)
            except OutOfMemoryError:
                met += 1
                found = engine(tables, make_bags(engine, 40, 4, seed=1))
        assert torch.equal(found, expected)
        if met < fail:
            break
    assert 9 <= met < SITES - 1


def test_a_split_that_finds_no_memory_is_made_by_one_thread() -> None:
    size = 20_000
    ids, offsets = torch.randint(0, 1000, (size,)), torch.arange(size + 1)
    split = cache_split.Splitter(cache_split.library(), torch.arange(0, 1000, 7), torch.arange(143), [0])

    def by_two(fail: int) -> Parts:
        torch.set_num_threads(2)
        cache_split.library().recemb_split_fail(fail)
        return split(ids, offsets, size, True)

    expected = None
    for fail in (0, 1, 2):
        # A thread keeps its memory: in a new one.
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(by_two, fail).result()
        expected = expected or found
        for name in ("ids", "offsets", "order"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_ids_are_counted_where_the_library_finds_no_memory() -> None:
    hot = HotRows(rows=10, policy="importance")
    whole, *short = (
        HotRowCache(spec(QuotientRemainder(collisions=6, cache=hot), 100), torch.device("cpu"))
        for _ in range(4)
    )
    hits, misses = torch.randint(0, 10, (50,)), torch.randint(0, 100, (200,))
    whole.observe(hits, misses)
    for fail, cache in enumerate(short, 1):
        cache_split.library().recemb_split_fail(fail)
        cache.observe(hits, misses)
        for name in ("scores", "owners", "votes"):
            assert torch.equal(getattr(whole, name), getattr(cache, name)), name


_SHORT = """
import resource
import torch
from recemb.backends import build
from recemb.bags import Bags
from recemb.engine import Engine
from recemb.spec import TableSpec, TensorTrain
table = TableSpec(name="t", num_embeddings=10**6, embedding_dim=16, feature_names=("f",),
                  compression=TensorTrain(rank=8))
tables, engine = build([table], torch.device("cpu")), Engine([table])
def pooled(size):
    return engine(tables, Bags(torch.arange(size) % 10**6, torch.arange(size + 1), 1))
pooled(1000).sum().backward()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 10**8, resource.RLIM_INFINITY))
try:
    pooled(2_000_000)
except MemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
pooled(1000).sum().backward()
pooled(20_000).sum().backward()
print("goes on")
"""


_SHORT_OF_GRADIENTS = """
import resource
import torch
from recemb.backends import build
from recemb.bags import Bags
from recemb.engine import Engine
from recemb.errors import OutOfMemoryError
from recemb.spec import QuotientRemainder, TableSpec
table = TableSpec(name="t", num_embeddings=12 * 10**6, embedding_dim=16, feature_names=("f",),
                  compression=QuotientRemainder(collisions=4))
tables, engine = build([table], torch.device("cpu")), Engine([table])
loss = engine(tables, Bags(torch.arange(100), torch.arange(101), 1)).sum()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 10**8, resource.RLIM_INFINITY))
try:
    loss.backward(retain_graph=True)
except OutOfMemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
loss.backward()
print("goes on")
"""


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (_SHORT, "2,000,000 ids of 2,000,000 samples"),
        (_SHORT_OF_GRADIENTS, "its rows or gradients, for 100 ids"),
    ],
    ids=["batch", "gradients"],
)
def test_what_is_too_large_for_the_process_is_an_error(script: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, last = done.stdout.strip().split("\n")
    assert first.startswith("tables t: no memory for ")
    assert said in first
    assert last == "goes on"
