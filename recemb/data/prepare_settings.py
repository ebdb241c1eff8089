"""What ``recemb prepare`` is asked for, checked before anything is read or written."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

from recemb.data.splits import check_fractions, parse_fraction
from recemb.errors import ConfigError, DataError

DATASET_NAMES: Final = ("criteo_kaggle", "criteo_1tb")
BAD_ROWS_MODES: Final = ("error", "skip")
MIN_MEMORY_BUDGET: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """What ``recemb prepare`` is asked for; validated when made (:class:`ConfigError` names the flag).

    Attributes:
        inputs: Criteo TSV files in time order, plain or gzip.
        output: the directory to write.
        dataset_name: "criteo_kaggle" or "criteo_1tb"; recorded, the two have one format.
        min_count: a token seen fewer times in the training split is out-of-vocabulary.
        max_ind_range: at most so many rows per table, or None.
        val_fraction, test_fraction: shares of the rows at the end of the log, val before test.
        bad_rows: "error" or "skip".
        max_bad_rows: with "skip", more bad rows than this are an error.
        memory_budget: bytes for counting and mapping tokens; the process needs about 0.3 GB besides.
    """

    inputs: tuple[Path, ...]
    output: Path
    dataset_name: str = "criteo_kaggle"
    min_count: int = 2
    max_ind_range: int | None = None
    val_fraction: Fraction = Fraction(1, 10)
    test_fraction: Fraction = Fraction(0)
    bad_rows: str = "error"
    max_bad_rows: int = 1000
    memory_budget: int = 1 << 30

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ConfigError("--input: give at least one Criteo TSV file")
        for flag, value, choices in (
            ("--dataset_name", self.dataset_name, DATASET_NAMES),
            ("--bad_rows", self.bad_rows, BAD_ROWS_MODES),
        ):
            if value not in choices:
                raise ConfigError(f"{flag} {value!r} is unknown; choose one of {', '.join(choices)}")
        if self.min_count < 1:
            raise ConfigError(f"--min_count {self.min_count} must be at least 1")
        if self.max_ind_range is not None and self.max_ind_range < 2:
            raise ConfigError(
                f"--max_ind_range {self.max_ind_range} must be at least 2 (row 0 is out-of-vocabulary)"
            )
        if self.max_bad_rows < 0:
            raise ConfigError(f"--max_bad_rows {self.max_bad_rows} must not be negative")
        if self.memory_budget < MIN_MEMORY_BUDGET:
            raise ConfigError(
                f"--memory_budget {self.memory_budget} must be at least {MIN_MEMORY_BUDGET} bytes (1MB)"
            )
        check_fractions(
            parse_fraction(self.val_fraction, "--val_fraction"),
            parse_fraction(self.test_fraction, "--test_fraction"),
        )

    def to_json(self) -> dict[str, Any]:
        """The settings that decide what is written, with size and time of every input.

        Raises:
            DataError: when an input is missing; ConfigError when one is given twice (its rows would be in two
                splits).
        """
        inputs = []
        seen: dict[tuple[int, int], Path] = {}
        for path in self.inputs:
            try:
                status = path.stat()
            except OSError as error:
                raise DataError(f"{path}: {error.strerror}") from None
            if not path.is_file():
                raise DataError(f"{path}: is no file; give the TSV files themselves")
            identity = (status.st_dev, status.st_ino)
            if identity in seen:
                raise ConfigError(
                    f"--input: {path} is given twice (as {seen[identity]}); its rows would be repeated"
                )
            seen[identity] = path
            inputs.append(
                {"path": str(path.resolve()), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
            )
        return {
            "dataset_name": self.dataset_name,
            "inputs": inputs,
            "min_count": self.min_count,
            "max_ind_range": self.max_ind_range,
            "val_fraction": str(self.val_fraction),
            "test_fraction": str(self.test_fraction),
        }
