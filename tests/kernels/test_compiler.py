"""Which compiler is taken, and what is said of one that is not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from recemb.training.diagnosis import examine
from recemb_kernels import build, check, native
from recemb_kernels.digit_tree.step import loaded, step_module
from recemb_kernels.lookup import TableShape, available
from recemb_kernels.pooled_gather import Operation, RowShape, pooled_gather
from recemb_kernels.tt_gather import TrainShape, tt_gather
from tests.kernels.cases import step_or_skip


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
        assert available(shapes, torch.device("cpu"), True) == [False] * 8
    assert len(caught) == 1
    assert str(tmp_path / "g++" if starts else "/no/such/g++") in str(caught[0].message)
    assert len(native._unavailable) == 8
    for op in ("tt_gather", "pooled_gather"):
        assert native.status()[op].startswith("plain torch: the C++ compiler")


@pytest.fixture
def _step_anew() -> Iterator[None]:
    """The look-up that trains is not there yet."""
    step_or_skip()
    step_module.cache_clear()
    yield
    step_module.cache_clear()


@pytest.mark.usefixtures("_step_anew")
@pytest.mark.parametrize("strict", [False, True])
def test_steps_are_taken_from_python_where_only_their_library_fails(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    text = 'case "$*" in *step.cpp*) echo "error: no such header" >&2; exit 1;; esac\nexec g++ "$@"'
    monkeypatch.setenv("CXX", script(tmp_path / "g++", text))
    shapes = [TableShape(pooled_gather, RowShape(Operation.ROW, (9,), (8,)))]
    assert available(shapes, torch.device("cpu"), False) == [True], "without a word: nothing trains"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pytest.raises if strict else pytest.warns
        with found(UserWarning, match="training_step.* from Python, which is slower: .*no such header"):
            assert available(shapes, torch.device("cpu"), True) == [True]
    (finding,) = [each for each in examine() if each.name == f"kernel {native.STEP}"]
    assert finding.status == "note"
    assert finding.value.startswith("steps are taken from Python: the C++ compiler")


@pytest.mark.usefixtures("_step_anew")
def test_a_table_on_plain_torch_is_said_beside_steps_from_python(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = 'case "$*" in *step.cpp*|*tt_gather*) exit 1;; esac\nexec g++ "$@"'
    monkeypatch.setenv("CXX", script(tmp_path / "g++", text))
    shapes = [
        TableShape(pooled_gather, RowShape(Operation.ROW, (9,), (8,))),
        TableShape(tt_gather, TrainShape((5, 5), (19, 23), (1, 3, 1))),
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert available(shapes, torch.device("cpu"), True) == [True, False]
    first, *rest = [str(each.message) for each in caught]
    assert "tt_gather" in first
    assert "on plain torch" in first
    assert not rest, "the same compiler fails with the same words"


def test_a_batch_is_checked_in_torch_where_the_driver_alone_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise build.KernelUnavailableError("no driver in this test")

    step_or_skip()
    assert loaded
    monkeypatch.setattr(native, "_unavailable", {})
    monkeypatch.setattr(check, "driver", fails)
    check.check_address.cache_clear()
    ids, offsets = torch.tensor([0, 1]), torch.tensor([0, 2])
    try:
        with pytest.warns(UserWarning, match="check_bags.* on plain torch.*no driver in this test"):
            assert not check.bags_are_valid(ids, offsets, None, 1, None)
        assert not check.bags_are_valid(ids, offsets, None, 1, None)
    finally:
        check.check_address.cache_clear()
