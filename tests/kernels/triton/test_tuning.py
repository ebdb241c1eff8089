"""Kernels that are tuned, shared by threads: launches and their times are stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, RLock, Thread, current_thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from recemb_kernels.triton_frame import captures, elements
from recemb_kernels.triton_frame.elements import tuned
from recemb_kernels.tt_gather.triton_kernel import slice_gradient
from recemb_kernels.tt_gather.triton_variants import EVERY
from tests.kernels.triton.graph_cases import is_free_elsewhere

# A thread that waits longer than this hangs.
SECONDS = 20


class Door:
    """The lock, which says when another thread than the test's own stands before it."""

    def __init__(self) -> None:
        self.reached, self._lock, self._own = Event(), RLock(), current_thread()

    def __enter__(self) -> None:
        if current_thread() is not self._own:
            self.reached.set()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class Tuner:
    """A tuned kernel that adds 1 to its gradient.

    Attributes:
        calls: whose trials begin and end, and whose launches, by the names of threads.
        during: what else happens within the first trial.
    """

    calls: list[str]
    during: Callable[[], None] | None

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.during = [], None
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = False  # whose launches try nothing
            self._tuned = tuned(slice_gradient, ("Q",), EVERY, lambda _: EVERY[:1], restore=("grad",))
        self._tuned.fn = SimpleNamespace(run=self._run)
        monkeypatch.setattr(triton.testing, "do_bench", self._time)

    @property
    def nargs(self) -> Any:
        """What the tuner keeps of a launch."""
        return self._tuned.nargs

    @property
    def best(self) -> tuple[int, int]:
        """Warps and stages of the last launch."""
        return self._tuned.best_config.num_warps, self._tuned.best_config.num_stages

    def launch(self, grad: Tensor) -> None:
        self._tuned[1, 1](grad, Q=1)

    def _run(self, grad: Tensor, **_: Any) -> None:
        self.calls.append(f"{current_thread().name} launches")
        grad += 1

    def _time(self, call: Callable[[], None], **_: Any) -> list[float]:
        name, during = current_thread().name, self.during
        self.during = None
        self.calls.append(f"{name} tries")
        call()
        if during is not None:
            during()
        call()
        self.calls.append(f"{name} has tried")
        return [1.0, 1.0, 1.0]


def test_threads_tune_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once they would restore each other's gradients, and launch with each other's arguments."""
    tuner, door = Tuner(monkeypatch), Door()
    monkeypatch.setattr(elements, "exclusive", door)
    monkeypatch.setattr(current_thread(), "name", "one")
    mine, other = torch.full((4,), 100.0), torch.full((4,), 200.0)
    thread = Thread(target=tuner.launch, args=(other,), name="two", daemon=True)
    reached: list[bool] = []

    def during() -> None:
        thread.start()
        reached.append(door.reached.wait(SECONDS))

    tuner.during = during
    tuner.launch(mine)
    thread.join(SECONDS)
    assert reached == [True]
    assert tuner.calls == [
        *("one tries", "one launches", "one launches", "one has tried", "one launches"),
        "two launches",  # with what has been found
    ]
    assert mine.tolist() == 4 * [101.0]
    assert other.tolist() == 4 * [201.0]


def test_a_launch_that_fails_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuner is there for good; arguments are a batch's memory."""
    tuner, grad = Tuner(monkeypatch), torch.zeros(4)

    def fail() -> None:
        raise KeyboardInterrupt

    tuner.during = fail
    with pytest.raises(KeyboardInterrupt):
        tuner.launch(grad)
    assert tuner.nargs is None


def test_without_memory_for_trials_the_first_variant_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner, grad = Tuner(monkeypatch), torch.zeros(4)

    def exhaust() -> None:
        raise torch.OutOfMemoryError("for a trial's copies")

    tuner.during = exhaust
    tuner.launch(grad)
    name = current_thread().name
    assert tuner.calls == [f"{name} tries", f"{name} launches", f"{name} launches"]
    assert tuner.best == EVERY[0]


def test_no_graph_is_captured_beside_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial waits for the device, which breaks another thread's capture."""
    tuner, grad, free = Tuner(monkeypatch), torch.zeros(4), []
    tuner.during = lambda: free.append(is_free_elsewhere())
    tuner.launch(grad)
    assert free == [False]
    with captures.exclusive:
        tuner.launch(grad)
    assert is_free_elsewhere()
    assert grad.tolist() == 4 * [2.0]
