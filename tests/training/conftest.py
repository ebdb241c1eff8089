"""A small synthetic log, configurations that train on it in a second, and signals that stop them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recemb.data.synthetic import write_synthetic
from recemb.training import loop as loop_module
from recemb.training.config import RunConfig, parse_config


@pytest.fixture(scope="session")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3,200 training, 400 validation and 400 test rows."""
    path = tmp_path_factory.mktemp("log") / "synthetic"
    write_synthetic(path, 4000, "1/2000", seed=3, val_fraction="0.1", test_fraction="0.1")
    return path


@pytest.fixture
def make_config(log_dir: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """A small model on ``log_dir``; keyword arguments override."""

    def make(**changes: Any) -> RunConfig:
        small = {
            "data_dir": str(log_dir),
            "output": str(tmp_path / "run"),
            "batch_size": 200,
            "embedding_dim": 4,
            "dense_arch_layer_sizes": "8,4",
            "over_arch_layer_sizes": "8,1",
            "validation_freq_within_epoch": 5,
        }
        return parse_config(small | changes)

    return make


@pytest.fixture
def stop_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Have a signal come in a method of the trainer, after so many steps; not again."""
    left: dict[str, Any] = {}

    def at(method: str, steps: int) -> None:
        original = left.setdefault(method, getattr(loop_module.Trainer, method))

        def patched(self: loop_module.Trainer, *args: Any) -> Any:
            if self.outcome.steps == steps:
                monkeypatch.setattr(loop_module.Trainer, method, original)
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, *args)

        monkeypatch.setattr(loop_module.Trainer, method, patched)

    return at
