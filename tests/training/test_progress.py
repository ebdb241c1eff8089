"""What a terminal shows while a run trains."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest

from recemb.training.metrics import ClickMetrics
from recemb.training.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_shows_loss_auc_and_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    metrics = ClickMetrics()
    metrics.update(np.array([1.0, -1.0, 0.5]), np.array([1.0, 0.0, 0.0]))
    progress = Progress("tt", 30)
    wanted = []
    for _ in range(21):
        wanted.append(progress.wants_figures)
        progress.step(metrics.compute() if wanted[-1] else None, 12345.0)
    progress.close()
    assert [step for step, wants in enumerate(wanted) if wants] == [0, 20]
    shown = terminal.getvalue()
    assert "tt:" in shown
    assert "21/30" in shown
    assert f"loss {metrics.compute().logloss:.4f}, AUC 1.00000, 12,345 samples/s" in shown


def test_speed_is_a_dash_before_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress("tt", 30)
    progress.step(ClickMetrics().compute(), None)
    progress.close()
    assert ", - samples/s" in terminal.getvalue()


def test_nothing_is_drawn_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    progress = Progress("tt", 30)
    assert not progress.wants_figures
    progress.step(None, 1.0)
    progress.note("a remark")
    progress.close()
    assert stream.getvalue() == "tt: a remark\n"
