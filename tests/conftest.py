"""Settings for every test: equal hypothesis examples on every run, the shared data, Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from recemb_kernels.triton_frame.graphs import GraphedGroup

# Where there is no GPU, kernels run in the interpreter of Triton. That is chosen as they are defined, and for
# its own functions as it is imported: before any test.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Derandomised: a red run is red again on the next machine. No database, so a checkout stays clean.
settings.register_profile(
    "recemb",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("recemb")


@pytest.fixture(scope="session", autouse=True)
def _compiled_step() -> None:
    """So that no rank of a test waits for another one's compiler, longer than its timeout."""
    from recemb_kernels.build import KernelUnavailableError
    from recemb_kernels.digit_tree.step import step_module

    try:
        step_module()
    except KernelUnavailableError:
        return


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """How many threads torch and the kernels take, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def set_alone() -> Iterator[Callable[[int], None]]:
    """Whose parts of tables are in this test: one thread's each (1), all threads' (0), or as timed (-1)."""
    from recemb_kernels.digit_tree.group import driver

    yield driver().recemb_tree_alone
    driver().recemb_tree_alone(-1)


@pytest.fixture
def groups_made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[GraphedGroup]]:
    """The groups of tables whose look-ups on a GPU may be captured, as they are made in a test."""
    from recemb_kernels.triton_frame.graphs import GraphedGroup

    made: list[GraphedGroup] = []
    begin = GraphedGroup.__init__

    def watched(self: GraphedGroup, *args: Any) -> None:
        begin(self, *args)
        made.append(self)

    monkeypatch.setattr(GraphedGroup, "__init__", watched)
    yield made
    made.clear()  # while there still is what stands in for a GPU: pytest keeps the list


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Path of a licensed Criteo sample beside the repository; the test is skipped without it."""

    def locate(name: str) -> Path:
        path = Path(__file__).resolve().parents[2] / "shared" / "data" / name
        if not path.exists():
            pytest.skip(f"real Criteo rows are not part of the repository: no ../shared/data/{name}")
        return path

    return locate
