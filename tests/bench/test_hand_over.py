"""The time between two cores: that it is measured where it can be, and said."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from bench.hand_over import FAR, HandOver, core_to_core, hand_over

_CORES = len(os.sched_getaffinity(0))


@pytest.mark.skipif(_CORES < 2, reason="one core")
def test_two_cores_take_nanoseconds() -> None:
    # In a process of its own, as the number of threads is one of the process.
    program = (
        "import torch; from bench.hand_over import hand_over as f; torch.set_num_threads(2)\n"
        # Where other programs have the cores, a thread waits for its own.
        "print(min(f() for _ in range(50)))"
    )
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    # A system call takes longer, and light itself a nanosecond for the width of a board.
    assert 1 < float(found.stdout) < 20_000


@pytest.mark.parametrize("threads", [1, _CORES + 1])
def test_nothing_where_threads_are_not_on_cores_of_their_own(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        apart = HandOver()
        apart()
        assert hand_over() is None
        assert apart.median is None
    finally:
        torch.set_num_threads(before)


def test_the_median_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([30.0, 165.0, None, 32.0])
    monkeypatch.setattr("bench.hand_over.hand_over", lambda: next(found))
    apart = HandOver()
    for _ in range(4):
        apart()
    assert apart.median == 32.0


def test_far_cores_are_said_to_be() -> None:
    assert core_to_core(None) == ""
    assert core_to_core(30.2) == ", core to core 30 ns"
    line, far = core_to_core(FAR + 1).splitlines()
    assert line == f", core to core {FAR + 1:.0f} ns", "as long as of near ones: lines have 100 columns"
    assert far.startswith("(far:")
