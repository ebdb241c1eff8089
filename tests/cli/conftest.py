"""A small synthetic log, and the command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from recemb.cli.main import main
from recemb.data.synthetic import write_synthetic


class Answer(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "synthetic"
    write_synthetic(path, 2000, "1/2000", seed=1, val_fraction="0.2")
    return path


@pytest.fixture
def recemb(capfd: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """``recemb("train", "--seed", "1")`` -> exit code, stdout, stderr."""

    def call(*words: str) -> Answer:
        capfd.readouterr()
        code = main(words)
        return Answer(code, *capfd.readouterr())

    return call


@pytest.fixture
def small(log_dir: Path, tmp_path: Path) -> list[str]:
    """Flags of a run of a second; ``--output`` is ``tmp_path/run``."""
    return [
        *("--data_dir", str(log_dir), "--output", str(tmp_path / "run"), "--batch_size", "200"),
        *("--embedding_dim", "4", "--dense_arch_layer_sizes", "8,4", "--over_arch_layer_sizes", "8,1"),
    ]
