"""Settings for every test: the same hypothesis examples on every run, and the way to the shared data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Derandomised: a red run is red again on the next machine. No database, so a checkout stays clean.
settings.register_profile(
    "recemb",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("recemb")


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Path of a licensed Criteo sample beside the repository; the test is skipped without it."""

    def locate(name: str) -> Path:
        path = Path(__file__).resolve().parents[2] / "shared" / "data" / name
        if not path.exists():
            pytest.skip(f"real Criteo rows are not part of the repository: no ../shared/data/{name}")
        return path

    return locate
