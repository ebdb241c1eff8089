"""Kernels ask for what they read next: where compilers leave that out, no result shows it, only the time."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections import Counter

import pytest

from recemb_kernels import pooled_gather, robe_gather, tt_gather
from recemb_kernels.pooled_gather import Operation

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="reads the instructions of x86-64"),
    pytest.mark.skipif(not shutil.which("objdump"), reason="objdump, of binutils, is not installed"),
]


def prefetches(path: str) -> Counter[str]:
    """Instructions that ask for memory, of each function of a library."""
    listing = subprocess.run(
        ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", path],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found: Counter[str] = Counter()
    function = ""
    for line in listing.splitlines():
        if opened := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = opened[1]
            found[function] += 0
        elif "\tprefetch" in line:
            found[function] += 1
    return found


def counted(path: str, place: str) -> int:
    """In functions of that name, which this compiler has left as functions of their own."""
    return sum(count for name, count in prefetches(path).items() if place in name)


# A cache line each: a row of 16 columns, a product above it, what it sends.
@pytest.mark.parametrize(
    ("place", "places"),
    [
        (
            "Train<false>::forward_rows",
            4,
        ),  # products above rows, their first bags, some others, those of the same row
        (
            "TrainBackward<false>::sum_rows",
            4,
        ),  # where sums go, products above them, bags' gradients, weighted ones
        (
            "TrainBackward<false>::level_gradients<2>",
            4,
        ),  # slices, what rows send, products above, bags' gradients
        ("TrainBackward<false>::level_gradients<1>", 1),  # what prefixes send
    ],
)
def test_each_pass_of_a_train_asks_ahead(place: str, places: int) -> None:
    assert counted(tt_gather._library((1, 1, 16), (1, 16, 16, 1), ())._name, place) >= places


@pytest.mark.parametrize(
    ("place", "places"),
    [
        ("forward", 3),  # the first rows, those further on, bags between other tables' columns
        ("backward_rows", 4),  # rows and their states, bags' gradients, weighted ones
    ],
)
def test_each_pass_over_stored_rows_asks_ahead(place: str, places: int) -> None:
    assert counted(pooled_gather._library(Operation.ROW, 16, 16, ())._name, place) >= places


def test_rows_of_an_array_ask_ahead() -> None:
    """For bags' gradients, and the array rows that will be stepped on."""
    assert counted(robe_gather._library(16, 16, True, ())._name, "add_rows<recemb::Narrow>") >= 2
