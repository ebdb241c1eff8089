"""A run directory, whose files are complete or absent: each is written aside, synced and renamed.

::

    resolved_config.yaml            every setting, readable by --config
    metrics.jsonl                   one line per evaluation, flushed as it happens, or once the disk has room
    result.json                     written last; its status says whether the run ended or was interrupted
    checkpoints/model.safetensors   the best weights
    checkpoints/step-<n>/           what --resume goes on from (recemb.checkpoint)
    checkpoints/.lock               held by the run that trains here, which is named in it
    report/
    .replaced                       there until --overwrite has removed what was here
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from recemb.errors import CheckpointError, ConfigError
from recemb.files import is_full, write_aside, write_text

if TYPE_CHECKING:
    from torch import Tensor, nn

RESULT_FILE = "result.json"
CONFIG_FILE = "resolved_config.yaml"
METRICS_FILE = "metrics.jsonl"
CHECKPOINT_FILE = "checkpoints/model.safetensors"
LATEST_FILE = "checkpoints/LATEST"
REPORT_DIR = "report"
REPLACED_FILE = ".replaced"


@dataclass(frozen=True)
class RunDir:
    """The files of one run under ``path``."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        """Where the best weights are."""
        return self.path / CHECKPOINT_FILE

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints to resume from are, ``step-<n>`` each."""
        return self.path / CHECKPOINT_FILE.partition("/")[0]

    @property
    def is_complete(self) -> bool:
        """Whether the run here came to its end."""
        try:
            status = json.loads((self.path / RESULT_FILE).read_text(encoding="utf-8")).get("status")
        except (OSError, ValueError, AttributeError):
            return False
        return bool(status == "completed")

    @property
    def holds_run(self) -> bool:
        """Whether a run was begun here, whatever has become of it."""
        return any((self.path / name).is_file() for name in (CONFIG_FILE, RESULT_FILE))

    @property
    def is_replaced(self) -> bool:
        """Whether :meth:`mark_replaced` has been here and :meth:`create` not since."""
        return (self.path / REPLACED_FILE).is_file()

    def mark_replaced(self) -> None:
        """Claim the run which is here, if one is, and note that it gives way, for ranks that are restarted.

        Raises:
            ConfigError: another run trains here; or the directory cannot be written.
        """
        if self.holds_run:
            self.claim()
            with _writing(self.path):
                write_text(self.path / REPLACED_FILE, "")

    def check_free(self, overwrite: bool, resume: bool = False) -> None:
        """Refuse a directory that holds another run, unless it may be overwritten or is to be resumed.

        Raises:
            ConfigError: naming the ways out. Nothing has been changed.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--output {self.path} is a file; give a directory")
        if overwrite or resume:
            return
        # First: an interrupted run has a result too, and what replaces it would lose its checkpoints.
        if not self.is_complete and any(self.checkpoints.glob("step-*")):
            raise ConfigError(
                f"--output {self.path} holds the checkpoints of a run that did not end; give --resume to go "
                "on from the last one, or --overwrite to start anew"
            )
        if (self.path / RESULT_FILE).exists():
            raise ConfigError(
                f"--output {self.path} already holds the result of a run ({RESULT_FILE}); "
                "give another --output, or --overwrite to replace it"
            )

    def check_nothing_lost(self) -> None:
        """Refuse to start anew where ``--resume`` finds no checkpoint, but what a run has reached.

        Raises:
            ConfigError: naming the ways out. Nothing has been changed.
        """
        try:
            steps = json.loads((self.path / RESULT_FILE).read_text(encoding="utf-8")).get("steps")
        except (OSError, ValueError, AttributeError):
            steps = None
        if steps or (steps is None and self.checkpoint.exists()):
            raise ConfigError(
                f"--resume: {self.path} has a run's weights and no checkpoint to go on from; give "
                "another --output, or --overwrite to train again, with --checkpoint_freq to have checkpoints"
            )

    def claim(self) -> None:
        """Keep other runs out of the directory, which is made if need be, until this process ends.

        Raises:
            ConfigError: another run trains here, and which; or the directory cannot be written.
        """
        # Imported here, as torch is above.
        from recemb.checkpoint import folder

        with _writing(self.path):
            try:
                folder.lock(self.checkpoints)
            except CheckpointError as error:
                raise ConfigError(f"--output {self.path}: {error}") from error

    def create(self, config_yaml: str) -> None:
        """Make the directory, remove what an earlier run left in it, and write the configuration.

        Raises:
            ConfigError: the directory cannot be written.
        """
        with _writing(self.path):
            for folder in (self.checkpoint.parent, self.path / REPORT_DIR):
                folder.mkdir(parents=True, exist_ok=True)
            self._clear()
            write_text(self.path / CONFIG_FILE, config_yaml)

    def remove(self) -> None:
        """Remove what a run, which :meth:`claim` keeps away, left here; a folder with more in it stays.

        Raises:
            ConfigError: the directory cannot be written.
        """
        # As in claim.
        from recemb.checkpoint import folder

        with _writing(self.path):
            self._clear()
            (self.checkpoints / folder.LOCK_FILE).unlink(missing_ok=True)
            for path in (self.checkpoints, self.path / REPORT_DIR, self.path):
                if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
                    path.rmdir()

    def _clear(self) -> None:
        # The result goes first: without it the directory counts as unfinished.
        for name in (RESULT_FILE, METRICS_FILE, CHECKPOINT_FILE, CONFIG_FILE):
            (self.path / name).unlink(missing_ok=True)
        for folder in self.checkpoints.glob("step-*"):
            shutil.rmtree(folder)
        (self.path / LATEST_FILE).unlink(missing_ok=True)
        (self.path / REPLACED_FILE).unlink(missing_ok=True)

    def resume(self, config_yaml: str, records: Sequence[Mapping[str, object]]) -> None:
        """Go on with what is here: drop the result, and have these lines of metrics, no others.

        Some of them may not be there yet, when the disk was full.

        Raises:
            ConfigError: the directory cannot be written.
        """
        with _writing(self.path):
            (self.path / RESULT_FILE).unlink(missing_ok=True)
            write_text(self.path / METRICS_FILE, _lines(records))
            write_text(self.path / CONFIG_FILE, config_yaml)

    def append_metrics(self, *records: Mapping[str, object]) -> bool:
        """Add lines to ``metrics.jsonl``: all of them, or none and ``False`` where the disk is full.

        Raises:
            ConfigError: they cannot be written for another reason.
        """
        path = self.path / METRICS_FILE
        with _writing(self.path):
            before = path.stat().st_size if path.exists() else 0
            try:
                with path.open("a", encoding="utf-8") as stream:
                    stream.write(_lines(records))
            except OSError as error:
                # A part may be there, which the lines to come would follow.
                with suppress(FileNotFoundError):
                    os.truncate(path, before)
                if is_full(error):
                    return False
                raise
        return True

    def save_weights(self, weights: nn.Module | Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write a model's weights as safetensors (no pickle); ``metadata`` goes into the file's header.

        Args:
            weights: the model, or its state dict where no process has the whole model.
            metadata: text.
        """
        # As torch is above: reports read run directories without loading either.
        from safetensors.torch import save_file, save_model

        def write(aside: Path) -> None:
            if isinstance(weights, Mapping):
                save_file(dict(weights), aside, dict(metadata))
            else:
                save_model(weights, str(aside), dict(metadata))

        with _writing(self.path):
            write_aside(self.checkpoint, write)

    def write_result(self, result: Mapping[str, object]) -> None:
        """Write ``result.json``; NaN becomes null."""
        with _writing(self.path):
            write_text(self.path / RESULT_FILE, to_json(result, indent=2) + "\n")


class MetricsLog:
    """Lines for ``metrics.jsonl``; those that a full disk has no room for wait for the next that it has.

    Args:
        directory: of the run.
        warn: told once, should that happen.
    """

    def __init__(self, directory: RunDir, warn: Callable[[str], None]) -> None:
        self._directory, self._warn = directory, warn
        self._waiting: list[Mapping[str, object]] = []
        self._warned = False

    def add(self, record: Mapping[str, object]) -> None:
        """Write a line, or keep it."""
        self._waiting.append(record)
        self.flush()

    def flush(self) -> None:
        """Write what waits, if there is room."""
        if self._waiting and self._directory.append_metrics(*self._waiting):
            self._waiting.clear()
        if self._waiting and not self._warned:
            self._warned = True
            self._warn(
                f"warning: {self._directory.path / METRICS_FILE}: the disk is full, training goes on; the "
                "lines are written once there is room: free some"
            )


def to_json(value: object, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinities, which JSON lacks, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _lines(records: Sequence[Mapping[str, object]]) -> str:
    return "".join(f"{to_json(record)}\n" for record in records)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"--output {path}: cannot write: {error}; free the disk or give another --output"
        ) from error
