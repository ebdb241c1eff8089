"""What a person sees while a run trains: a bar on a terminal, one line per evaluation elsewhere."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

from tqdm import tqdm

from recemb.training.metrics import MetricValues

if TYPE_CHECKING:
    from recemb.training.loop import Evaluation

# Drawing more often than this only costs time; reading the running AUC is a pass over its histograms.
_REFRESH_STEPS = 20


class Progress:
    """Writes to stderr; ``label`` names the run (its method) on every line, on the rank where it is shown."""

    def __init__(self, label: str, total_steps: int, shown: bool = True) -> None:
        self._label = label
        self._total = total_steps
        self._bar = tqdm(
            total=total_steps,
            desc=label,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            disable=not (shown and sys.stderr.isatty()),
        )
        self._shown = shown

    def resume(self, step: int) -> None:
        """Begin after ``step`` steps, which do not count in the bar's speed."""
        self._bar.initial = self._bar.n = self._bar.last_print_n = step

    @property
    def wants_figures(self) -> bool:
        """Whether the step that ends now will be drawn with figures."""
        return not self._bar.disable and self._bar.n % _REFRESH_STEPS == 0

    def step(self, figures: MetricValues | None, samples_per_second: float | None) -> None:
        """Count one training step; ``figures`` are the metrics since the last evaluation, if wanted."""
        if figures is not None:
            self._bar.set_postfix_str(
                f"loss {figures.logloss:.4f}, AUC {_auc(figures.auc)}, {_speed(samples_per_second)}",
                refresh=False,
            )
        self._bar.update()

    def evaluation(self, evaluation: Evaluation, samples_per_second: float | None) -> None:
        """One line for an evaluation, on a terminal and elsewhere."""
        values = evaluation.values
        self.note(
            f"step {evaluation.step}/{self._total}  {evaluation.split} "
            f"AUC {_auc(values.auc)}  logloss {values.logloss:.5f}  NE {values.ne:.5f}  "
            f"{_speed(samples_per_second)}" + ("  best so far" if evaluation.best else "")
        )

    def note(self, text: str) -> None:
        """One line of text."""
        if self._shown:
            tqdm.write(f"{self._label}: {text}", file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def _speed(samples_per_second: float | None) -> str:
    return "- samples/s" if samples_per_second is None else f"{samples_per_second:,.0f} samples/s"


def _auc(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.5f}"
