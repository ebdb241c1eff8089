"""Kernels ask for what they read next: where compilers leave that out, no result shows it, only the time."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections import Counter

import pytest

from recemb_kernels.tt_gather import _library

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


@pytest.mark.parametrize(
    ("place", "least"),
    [
        ("forward_rows", 3),  # products above rows, the bags of rows and those of the same row
        ("sum_rows", 3),  # where sums go, products above them, bags' gradients
        ("level_gradients<2>", 4),  # the same, and the slices of the last core
        ("level_gradients<1>", 1),
    ],
)
@pytest.mark.parametrize("end", ["<false>", "<true>"])
def test_each_pass_of_a_train_asks_ahead(place: str, least: int, end: str) -> None:
    found = prefetches(_library((1, 1, 16), (1, 32, 32, 1), ())._name)
    counts = [
        count
        for name, count in found.items()
        if place in name and f"Train{end}" in name.replace("Backward", "")
    ]
    if not counts:
        pytest.skip("this compiler has made the pass part of another function")
    assert sum(counts) >= least
