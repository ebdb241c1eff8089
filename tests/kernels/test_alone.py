"""Whether threads take parts of a table alone: by what has been faster, tried again now and then."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import pytest

from recemb_kernels.build import QUICK, load
from recemb_kernels.digit_tree import group

SOURCES = (Path(__file__).with_name("alone.cpp"), Path(group.__file__).with_name("parts.cpp"))
# Steps between two trials, steps of one, and how many steps a trial takes to be seen.
PERIOD, TRIAL = 32, 2


def choices(
    together: Sequence[float], alone: Sequence[float], parts: int = 2, threads: int = 2
) -> list[bool]:
    """The way of each of some backwards, alone or not, by the seconds that either would take."""
    steps = len(together)
    library = load("alone", SOURCES, {}, QUICK)
    flat = [seconds for pair in zip(together, alone, strict=True) for seconds in pair]
    ways = (ctypes.c_int32 * steps)()
    library.recemb_test_alone(
        ctypes.c_int64(parts),
        ctypes.c_int64(steps),
        (ctypes.c_int32 * steps)(*[threads] * steps),
        (ctypes.c_double * (2 * steps))(*flat),
        ways,
    )
    return [bool(way) for way in ways]


def settled(ways: Sequence[bool]) -> set[bool]:
    """The ways of the steps that are no trials; the first ones are, of both ways."""
    return {way for k, way in enumerate(ways) if k % PERIOD >= TRIAL and k >= 2 * TRIAL}


@pytest.mark.parametrize("faster", ["alone", "together"])
def test_the_faster_way_is_taken_and_the_other_tried(faster: str) -> None:
    steps, factor = 4 * PERIOD, 0.8 if faster == "alone" else 1.2
    ways = choices([1.0] * steps, [factor] * steps)
    assert settled(ways) == {faster == "alone"}
    trials = [ways[k : k + TRIAL] for k in range(PERIOD, steps, PERIOD)]
    assert trials == [[faster != "alone"] * TRIAL] * 3


def test_a_way_that_becomes_slower_is_left_after_the_next_trials() -> None:
    """As when the host moves a machine's cores apart, or together again."""
    steps = 12 * PERIOD
    alone = [0.8] * (steps // 2) + [1.2] * (steps // 2)
    ways = choices([1.0] * steps, alone)
    assert settled(ways[: steps // 2]) == {True}
    assert ways[-PERIOD:] == [True] * TRIAL + [False] * (PERIOD - TRIAL)


def test_a_step_that_another_process_held_up_changes_nothing() -> None:
    steps = 4 * PERIOD
    alone = [0.8] * steps
    alone[PERIOD + 10] = 50.0
    assert settled(choices([1.0] * steps, alone)) == {True}


def test_the_first_step_of_a_way_is_not_timed() -> None:
    """It finds caches as the other way has left them."""
    steps = 4 * PERIOD
    changes = {0, 2 * TRIAL, *range(TRIAL, steps, PERIOD)}
    alone = [2.0 if k in changes else 0.9 for k in range(steps)]
    assert settled(choices([1.0] * steps, alone)) == {True}


@pytest.mark.parametrize(("parts", "threads"), [(1, 2), (2, 3), (2, 1)])
def test_fewer_parts_than_threads_are_shared(parts: int, threads: int) -> None:
    steps = 3 * PERIOD
    assert not any(choices([1.0] * steps, [0.1] * steps, parts, threads))
