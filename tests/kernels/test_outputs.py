"""Memory of large outputs is kept when they are freed, for those that come next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from recemb.bags import Bags
from recemb.errors import ConfigError
from tests.kernels.cases import make_engine, step_all, step_or_skip
from tests.processes import fork, status_of

LATELY = 64  # recemb_outputs.h
MEGABYTE = 2**20 // 64  # samples of 16 columns

LookUp = Callable[[int], Tensor]


def one_hot(samples: int) -> Bags:
    return Bags(torch.arange(samples) % 500, torch.arange(samples + 1), 1)


@pytest.fixture
def look_up() -> LookUp:
    """Looks up so many samples, one id each, in C++: the first is Python's. Nothing of others is kept."""
    step_or_skip()
    engine, tables = make_engine(methods=["dense"])
    step_all(tables, torch.optim.SGD, 0.1)

    def found(samples: int) -> Tensor:
        return engine(tables, one_hot(samples))

    found(7).sum().backward()
    forget(found)
    return found


def forget(look_up: LookUp) -> None:
    """Until all that is kept is two blocks of 2 MB."""
    for _ in range(2 * LATELY):
        look_up(MEGABYTE)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("megabytes", [1, 2, 3, 4, 40])
def test_the_next_output_has_the_memory_of_one_that_is_gone(look_up: LookUp, megabytes: int) -> None:
    first = look_up(megabytes * MEGABYTE)
    at = first.data_ptr()
    del first
    for samples in (megabytes * MEGABYTE, megabytes * MEGABYTE, int(megabytes * MEGABYTE * 0.8) + 4 * 2**10):
        assert look_up(samples).data_ptr() == at


def test_nobody_has_the_memory_of_an_output_that_is_used(look_up: LookUp) -> None:
    first = look_up(3 * MEGABYTE)
    alias = first.detach()[5:]
    expected = alias.clone()
    del first
    second = look_up(3 * MEGABYTE)
    second.detach().fill_(7.0)
    assert torch.equal(alias, expected)


def test_small_outputs_are_torchs(look_up: LookUp) -> None:
    small, large = look_up(MEGABYTE - 1), look_up(MEGABYTE)
    assert small.data_ptr() % 2**21
    assert not large.data_ptr() % 2**21


def test_a_block_twice_as_large_and_more_stays_for_larger_ones(look_up: LookUp) -> None:
    large = look_up(8 * MEGABYTE)
    at = large.data_ptr()
    del large
    small = look_up(4 * MEGABYTE)
    assert small.data_ptr() != at
    assert look_up(8 * MEGABYTE).data_ptr() == at


def test_the_latest_to_go_is_the_first_one_to_be_used_again(look_up: LookUp) -> None:
    first, second = look_up(3 * MEGABYTE), look_up(3 * MEGABYTE)
    at = second.data_ptr()
    del first
    del second
    for _ in range(3):
        assert look_up(3 * MEGABYTE).data_ptr() == at


def test_as_much_is_kept_as_was_used_at_once_lately(look_up: LookUp) -> None:
    def use(count: int) -> set[int]:
        outputs = [look_up(40 * MEGABYTE).detach().fill_(1.0) for _ in range(count)]
        return {out.data_ptr() for out in outputs}

    use(1)
    forget(look_up)
    before, each = resident(), 40 * 2**20
    first = use(6)
    assert 5.5 * each < resident() - before < 7.5 * each
    assert use(6) == first
    assert resident() - before < 7.5 * each
    # No more at once than two since then: others go.
    for _ in range(LATELY):
        use(2)
    assert 1.5 * each < resident() - before < 5.5 * each
    forget(look_up)
    assert resident() - before < 1.5 * each


def test_outputs_of_several_sizes_in_turn_have_each_their_own(look_up: LookUp) -> None:
    sizes = [20 * MEGABYTE, 2 * MEGABYTE, 8 * MEGABYTE]
    expected = [look_up(size).data_ptr() for size in sizes]
    for _ in range(3):
        assert [look_up(size).data_ptr() for size in sizes] == expected


def test_what_an_earlier_output_held_is_in_no_later_one(look_up: LookUp) -> None:
    engine, tables = make_engine(methods=["tt"])
    lengths = torch.randint(0, 3, (4 * MEGABYTE,), generator=torch.Generator().manual_seed(0))
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    bags = Bags(torch.arange(int(offsets[-1])) % 3000, offsets, 1)
    assert (lengths == 0).sum() > MEGABYTE

    def found() -> Tensor:
        with torch.no_grad():
            return engine(tables, bags)

    found()
    out = found()
    expected, at = out.clone(), out.data_ptr()
    for _ in range(3):
        out.fill_(torch.nan)
        del out
        out = found()
        assert out.data_ptr() == at
        assert torch.equal(out, expected)


def test_gradients_of_weights_lie_there_too(look_up: LookUp) -> None:
    engine, tables = make_engine(methods=["dense"])
    step_all(tables, torch.optim.SGD, 0.0)
    weights = torch.rand(20 * MEGABYTE, generator=torch.Generator().manual_seed(0))
    grads, places = [], []
    for _ in range(3):
        bags = one_hot(20 * MEGABYTE)
        bags.weights = weights.clone().requires_grad_()
        (grad,) = torch.autograd.grad(engine(tables, bags).sum(), [bags.weights])
        grads.append(grad.clone())
        places.append(grad.data_ptr())
        grad.fill_(torch.nan)
        del grad
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])
    assert places[1] == places[2]
    assert not places[1] % 2**21


def test_a_storage_may_be_given_away_and_grow(look_up: LookUp) -> None:
    """As modules that are sharded do with what is not needed between steps."""
    out = look_up(3 * MEGABYTE).detach()
    at, row = out.data_ptr(), out[0].clone()
    out.resize_(6 * MEGABYTE, 16)
    assert torch.equal(out[0], row)
    out.untyped_storage().resize_(0)
    assert look_up(3 * MEGABYTE).data_ptr() == at


def test_a_profiler_sees_them(look_up: LookUp) -> None:
    kept = look_up(9 * MEGABYTE)
    del kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        look_up(9 * MEGABYTE)
    changes = [event.self_cpu_memory_usage for event in seen.events() if event.name == "[memory]"]
    assert 9 * 2**20 in changes
    assert -9 * 2**20 in changes


def test_threads_share_them(look_up: LookUp) -> None:
    def many(samples: int) -> bool:
        expected = look_up(samples).clone()
        return all(torch.equal(look_up(samples), expected) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(many, [2 * MEGABYTE, 2 * MEGABYTE + 1, 3 * MEGABYTE, 5 * MEGABYTE]))


def test_a_child_has_its_own(look_up: LookUp) -> None:
    kept = look_up(3 * MEGABYTE).detach()
    expected = kept.clone()

    def work() -> None:
        signal.alarm(60)
        torch.set_num_threads(1)
        kept.fill_(7.0)
        for _ in range(3):
            assert torch.equal(look_up(3 * MEGABYTE), expected)

    assert status_of(fork(work)) == 0
    assert torch.equal(kept, expected)


_SHORT = """
import resource
import torch
from recemb.errors import OutOfMemoryError
from tests.kernels.cases import make_engine, step_all
from tests.kernels.test_outputs import one_hot
engine, tables = make_engine(methods=["dense"])
step_all(tables, torch.optim.SGD, 0.1)
engine(tables, one_hot(1000)).sum().backward()
batches = [one_hot(size) for size in (2**20, 2**22, 2**20 + 2**18)]
with torch.no_grad():
    engine(tables, batches[0])
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, resource.RLIM_INFINITY))
    try:
        engine(tables, batches[1])
    except OutOfMemoryError:
        print("short")
    engine(tables, batches[0])
    engine(tables, batches[2])
print("goes on")
"""


def test_what_is_kept_goes_where_memory_is_short(look_up: LookUp) -> None:
    """The limit stays: what is a little larger than what is kept needs its place."""
    done = subprocess.run(
        [sys.executable, "-c", _SHORT], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[:2] == ["short", "goes on"]


def test_transforms_are_refused_whatever_the_size(look_up: LookUp) -> None:
    engine, tables = make_engine(methods=["dense"])
    bags = one_hot(MEGABYTE)
    engine(tables, bags)
    engine(tables, bags)
    with pytest.raises(ConfigError, match=r"cannot be transformed by torch\.func"):
        torch.func.grad(lambda x: (x * engine(tables, bags)).sum())(torch.ones(()))
