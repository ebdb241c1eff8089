"""Memory of large outputs is kept when they are freed, for those that come next."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recemb.bags import Bags
from recemb.engine import Engine
from tests.kernels.cases import make_bags, make_engine, step_all, step_or_skip

KEPT = 4  # recemb_outputs.h
ROW = 96 * 4  # bytes of a sample: six tables of 16 columns


def samples(megabytes: float) -> int:
    return int(megabytes * 2**20) // ROW


LookUp = Callable[[int], Tensor]


@pytest.fixture
def look_up() -> Iterator[LookUp]:
    """Looks up so many samples, one id each, in C++: what comes first is Python's."""
    step_or_skip()
    engine, tables = make_engine()
    step_all(tables, torch.optim.SGD, 0.1)

    def found(batch: int) -> Tensor:
        return engine(tables, make_bags(engine, batch, 1, seed=batch))

    found(7).sum().backward()
    drop_what_is_kept(found)
    yield found
    drop_what_is_kept(found)


def drop_what_is_kept(look_up: LookUp) -> None:
    """Blocks of which no test asks for one."""
    outputs = [look_up(samples(1.1)) for _ in range(KEPT)]
    del outputs


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("megabytes", [3, 40])
def test_the_next_output_has_the_memory_of_one_that_is_gone(look_up: LookUp, megabytes: int) -> None:
    first = look_up(samples(megabytes))
    at, pages = first.data_ptr(), resident()
    del first
    second = look_up(samples(megabytes))
    assert second.data_ptr() == at
    assert resident() < pages + megabytes * 2**19
    # Somewhat less fits, too.
    del second
    assert look_up(samples(megabytes * 0.8)).data_ptr() == at


def test_nobody_has_the_memory_of_an_output_that_is_used(look_up: LookUp) -> None:
    first = look_up(samples(3))
    alias = first.detach()[5:]
    expected = alias.clone()
    del first
    second = look_up(samples(3))
    second.detach().fill_(7.0)
    assert torch.equal(alias, expected)


def test_small_outputs_are_torchs(look_up: LookUp) -> None:
    small = look_up(samples(0.9))
    at = small.data_ptr()
    assert at % 2**21
    large = look_up(samples(1.2))
    assert not large.data_ptr() % 2**21


def test_a_block_twice_as_large_and_more_stays_for_larger_ones(look_up: LookUp) -> None:
    large = look_up(samples(9))
    at = large.data_ptr()
    del large
    small = look_up(samples(4))
    assert small.data_ptr() != at
    assert look_up(samples(9)).data_ptr() == at


def test_so_many_are_kept_and_no_more(look_up: LookUp) -> None:
    before = resident()
    outputs = [look_up(samples(40)).detach().fill_(1.0) for _ in range(KEPT + 3)]
    grown = resident() - before
    assert grown > (KEPT + 2) * 40 * 2**20
    del outputs
    assert resident() - before < (KEPT + 1) * 42 * 2**20
    drop_what_is_kept(look_up)
    assert resident() - before < 42 * 2**20


def test_what_an_earlier_output_held_is_in_no_later_one() -> None:
    step_or_skip()
    engine, tables = make_engine()
    step_all(tables, torch.optim.SGD, 0.1)
    bags = make_bags(engine, samples(3), 2, seed=1)  # a third of them empty

    def found() -> Tensor:
        with torch.no_grad():
            return engine(tables, bags)

    found()
    expected = found().clone()
    for _ in range(3):
        out = found()
        at = out.data_ptr()
        assert torch.equal(out, expected)
        out.fill_(torch.nan)
        del out
    assert found().data_ptr() == at


def test_gradients_pass_through_them(look_up: LookUp) -> None:
    engine, tables = make_engine()
    weights = torch.rand(6 * samples(3), generator=torch.Generator().manual_seed(0))
    grads = []
    for _ in range(3):
        bags = make_bags(engine, samples(3), 1, seed=1)
        bags.weights = weights.clone().requires_grad_()
        out = engine(tables, bags)
        out.sum().backward()
        assert bags.weights.grad is not None
        grads.append(bags.weights.grad)
        out.detach().fill_(torch.nan)
        del out
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_a_storage_may_be_given_away_and_grow(look_up: LookUp) -> None:
    """As modules that are sharded do with what is not needed between steps."""
    out = look_up(samples(3)).detach()
    at, row = out.data_ptr(), out[0].clone()
    out.resize_(samples(6), out.shape[1])
    assert torch.equal(out[0], row)
    out.untyped_storage().resize_(0)
    assert look_up(samples(3)).data_ptr() == at


def test_threads_share_them(look_up: LookUp) -> None:
    engine, tables = make_engine()
    bags = [make_bags(engine, samples(2), 1, seed=s) for s in range(4)]

    def one(part: Bags) -> Tensor:
        with torch.no_grad():
            return engine(tables, part)

    def many(part: Bags) -> bool:
        expected = one(part).clone()
        return all(torch.equal(one(part), expected) for _ in range(10))

    one(bags[0])
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(many, bags))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_has_its_own(look_up: LookUp) -> None:
    engine, tables = make_engine(methods=["dense"])
    bags = Bags(torch.zeros(2**16, dtype=torch.int64), torch.arange(2**16 + 1), 1)

    def first(engine: Engine) -> Tensor:
        with torch.no_grad():
            return engine(tables, bags)[0].clone()

    expected = first(engine)
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(first(engine), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(first(engine), expected)
