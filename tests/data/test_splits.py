"""Splits by time: disjoint, complete, in order, exact (F4)."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.data.splits import TimeSplit, parse_fraction
from recemb.errors import ConfigError


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(1, 5000), st.fractions(0, Fraction(9, 20)), st.fractions(0, Fraction(9, 20)))
def test_f4_ranges_are_adjacent_and_cover_every_row(rows: int, val: Fraction, test: Fraction) -> None:
    try:
        ranges = TimeSplit.by_time(rows, val, test).ranges()
    except ConfigError:
        assert (val > 0 and int(rows * val) == 0) or (test > 0 and int(rows * test) == 0)
        return
    assert [*ranges["train"], *ranges["val"], *ranges["test"]] == list(range(rows))
    assert len(ranges["val"]) == int(rows * val)
    assert len(ranges["test"]) == int(rows * test)
    assert len(ranges["train"]) > 0


def test_kaggle_days_are_exact() -> None:
    ranges = TimeSplit.by_time(45_840_617, Fraction("1/14"), Fraction("1/14")).ranges()
    assert len(ranges["val"]) == len(ranges["test"]) == 45_840_617 // 14


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.1", Fraction(1, 10)),
        (0.1, Fraction(1, 10)),
        ("1/14", Fraction(1, 14)),
        (" 0 ", Fraction(0)),
        (Fraction(2, 7), Fraction(2, 7)),
    ],
)
def test_fractions_are_exact(text: str | float | Fraction, value: Fraction) -> None:
    assert parse_fraction(text, "--val_fraction") == value


@pytest.mark.parametrize("text", ["1", "-0.1", "2/0", "ten", "nan", "inf", "", "1.0000001"])
def test_bad_fractions_name_the_flag(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--val_fraction"):
        parse_fraction(text, "--val_fraction")


def test_no_row_left_to_train_on() -> None:
    with pytest.raises(ConfigError, match="leave no row"):
        TimeSplit.by_time(10, Fraction(1, 2), Fraction(1, 2))


def test_a_split_of_less_than_a_row_names_its_flag() -> None:
    with pytest.raises(ConfigError, match=r"^--test_fraction 1/100 of 50 rows"):
        TimeSplit.by_time(50, Fraction(1, 10), Fraction(1, 100))
