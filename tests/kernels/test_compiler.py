"""Which compiler is taken, and what is said of one that is not."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from recemb_kernels import build, native
from recemb_kernels.lookup import TableShape, available
from recemb_kernels.pooled_gather import Operation, RowShape, pooled_gather
from recemb_kernels.tt_gather import TrainShape, tt_gather


def script(path: Path, text: str) -> str:
    """A program of the shell."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_cxx_may_be_several_words(
    cache: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = script(tmp_path / "launcher", 'echo "$1" >> "$0.log"; exec "$@"')
    monkeypatch.setenv("CXX", f"{launcher} g++ -DONE=1")
    assert build.load("answer", [source], {"ANSWER": "(1 + ONE)"}).answer() == 2
    assert (tmp_path / "launcher.log").read_text() == "g++\n" * 2  # its version, and the library


@pytest.mark.parametrize(
    ("cxx", "says"),
    [
        ("/no/such/g++ -m64", r"/no/such/g\+\+ -m64 does not start; install g\+\+.*No such file"),
        ("'g++", r"CXX='g\+\+ is no command.*No closing quotation"),
        ("/bin/false", "/bin/false fails with exit status 1"),
        ("echo Debian clang version 14", "is clang, whose OpenMP is not torch's; set CXX"),
    ],
)
def test_cxx_that_is_of_no_use_is_named(
    cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch, cxx: str, says: str
) -> None:
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(build.KernelUnavailableError, match=says):
        build.load("answer", [source], {"ANSWER": 1})


def test_a_file_that_is_no_program_is_named(
    cache: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "compiler"
    path.write_bytes(b"\x7fELF then nothing")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    with pytest.raises(build.KernelUnavailableError, match=r"compiler does not start.*Exec format error"):
        build.load("answer", [source], {"ANSWER": 1})


@pytest.mark.parametrize("starts", [True, False], ids=["fails to compile", "does not start"])
def test_many_shapes_that_fail_alike_warn_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, starts: bool
) -> None:
    text = 'case "$*" in *-shared*) echo "error: $*" >&2; exit 1;; esac\necho 12'
    monkeypatch.setenv("CXX", script(tmp_path / "g++", text) if starts else "/no/such/g++")
    # Of widths that no other test has had compiled.
    shapes = [TableShape(tt_gather, TrainShape((5, 5), (19, width), (1, 3, 1))) for width in range(1, 6)]
    shapes += [TableShape(pooled_gather, RowShape(Operation.ROW, (9,), (1001 + k,))) for k in range(3)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert available(shapes, torch.device("cpu")) == [False] * 8
    assert len(caught) == 1
    assert str(tmp_path / "g++" if starts else "/no/such/g++") in str(caught[0].message)
    assert len(native._unavailable) == 8
    for op in ("tt_gather", "pooled_gather"):
        assert native.status()[op].startswith("plain torch: the C++ compiler")
