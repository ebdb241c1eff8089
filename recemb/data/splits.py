"""Train, validation and test rows by time: the last rows of the log are held out, and no row is used twice.

The role of a row is its position alone. Nothing is read from a file's name, and a fraction is exact
(``"1/14"`` is one fourteenth, not its nearest float), so that the three ranges are the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from recemb.data.layout import SPLITS
from recemb.errors import ConfigError


def parse_fraction(text: str | float | Fraction, flag: str) -> Fraction:
    """``"0.1"``, ``"1/14"`` or a number as an exact fraction in [0, 1), else :class:`ConfigError`."""
    try:
        value = Fraction(str(text).strip())
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"{flag}: {text!r} is not a fraction; give for example 0.1 or 1/14") from None
    if not 0 <= value < 1:
        raise ConfigError(f"{flag}: {text} is outside [0, 1); give for example 0.1 or 1/14")
    return value


def check_fractions(val_fraction: Fraction, test_fraction: Fraction) -> None:
    """:class:`ConfigError` unless some rows are left to train on."""
    if val_fraction + test_fraction >= 1:
        raise ConfigError(
            f"--val_fraction {val_fraction} and --test_fraction {test_fraction} leave no row to train on; "
            "their sum must be below 1"
        )


@dataclass(frozen=True)
class TimeSplit:
    """Half-open row ranges of a log of ``num_rows`` rows in time order: train, then validation, then test."""

    num_rows: int
    val_rows: int
    test_rows: int

    @classmethod
    def by_time(cls, num_rows: int, val_fraction: Fraction, test_fraction: Fraction) -> TimeSplit:
        """The last ``test_fraction`` of the rows is for testing, ``val_fraction`` before it for validation.

        Each size is rounded down; :class:`ConfigError` when no row would be left to train on, or when a
        fraction above 0 gives a split of no rows.
        """
        check_fractions(val_fraction, test_fraction)
        split = cls(num_rows, int(num_rows * val_fraction), int(num_rows * test_fraction))
        for flag, fraction, rows in (
            ("--val_fraction", val_fraction, split.val_rows),
            ("--test_fraction", test_fraction, split.test_rows),
        ):
            if fraction > 0 and rows == 0:
                raise ConfigError(
                    f"{flag} {fraction} of {num_rows} rows is less than one row; raise it, or give 0 "
                    "for no such split"
                )
        return split

    def ranges(self) -> dict[str, range]:
        """``{"train": range, "val": range, "test": range}``: disjoint, adjacent, together all the rows."""
        val_start = self.num_rows - self.val_rows - self.test_rows
        test_start = self.num_rows - self.test_rows
        bounds = (0, val_start, test_start, self.num_rows)
        return {split: range(bounds[i], bounds[i + 1]) for i, split in enumerate(SPLITS)}
