"""Exit codes, lazy imports and the message for a wrong trio of packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import recemb
from recemb import errors

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("name", "code", "builtin"),
    [
        ("ConfigError", 2, ValueError),
        ("BatchError", 3, ValueError),
        ("DataError", 3, ValueError),
        ("OutOfMemoryError", 4, MemoryError),
        ("CheckpointError", 3, ValueError),
        ("NonFiniteError", 5, ArithmeticError),
        ("Interrupted", 75, Exception),
    ],
)
def test_exit_codes(name: str, code: int, builtin: type[Exception]) -> None:
    error = getattr(errors, name)("what is wrong")
    assert error.exit_code == code
    assert isinstance(error, errors.RecembError)
    assert isinstance(error, builtin)
    assert str(error) == "what is wrong"


def imported_by(statement: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after ``statement``."""
    code = f"import sys\n{statement}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    heavy = {"torch", "torchrec", "fbgemm_gpu", "pyarrow", "matplotlib", "numpy", "tensordict"}
    return heavy & set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    ["import recemb", "import recemb.errors", "import recemb.spec; recemb.spec.TensorTrain(rank=2)"],
)
def test_importing_recemb_loads_nothing_heavy(statement: str) -> None:
    assert imported_by(statement) == set()


def test_compressions_need_no_torch() -> None:
    assert imported_by("import recemb; recemb.ROBE(compress_rate=2, block_size=4); recemb.Dense()") == set()


def test_checkpoints_need_no_torchrec() -> None:
    assert imported_by("import recemb.checkpoint") == {"torch", "numpy"}


def test_every_public_name_loads() -> None:
    for name in recemb.__all__:
        assert getattr(recemb, name) is not None
    assert dir(recemb) == sorted(recemb.__all__)
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = recemb.missing


def test_f36_a_matching_trio() -> None:
    from recemb.stack import check_stack, mismatches, versions

    assert mismatches({"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm": "1.8.1"}) == []
    assert mismatches(versions()) == []
    check_stack()


@pytest.mark.parametrize(
    ("name", "version", "sentence"),
    [
        ("torch", "2.14.1", "torch 2.14.1 is installed, 2.13.* is needed"),
        ("torch", "2.1.3", "torch 2.1.3 is installed, 2.13.* is needed"),
        ("torchrec", "1.9.0", "torchrec 1.9.0 is installed, 1.8.* is needed"),
        ("fbgemm", "1.9.0", "fbgemm 1.9.0 is installed, 1.8.* is needed"),
        ("fbgemm", None, "fbgemm is not installed"),
        ("torchrec", None, "torchrec is not installed"),
    ],
)
def test_f36_a_wrong_trio_is_named(name: str, version: str | None, sentence: str) -> None:
    from recemb.stack import mismatches

    trio = {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm": "1.8.0"}
    if version is None:
        del trio[name]
    else:
        trio[name] = version
    assert mismatches(trio) == [sentence]


def test_f36_the_error_holds_the_command_that_repairs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from recemb import stack

    trio = {"torch": "2.14.1", "torchrec": "1.8.0", "fbgemm": "1.9.0"}
    monkeypatch.setattr(stack, "versions", lambda: trio)
    with pytest.raises(errors.ConfigError) as caught:
        stack.check_stack()
    message = str(caught.value)
    assert "torch 2.14.1 is installed" in message
    assert "fbgemm 1.9.0 is installed" in message
    assert stack.REPAIR_CPU in message
    assert stack.REPAIR_GPU in message


def test_f36_a_torchrec_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    from recemb import stack

    def broken(name: str) -> None:
        raise OSError("libtorch_cuda.so: cannot open shared object file")

    monkeypatch.setattr(stack, "import_module", broken)
    with pytest.raises(errors.ConfigError, match=r"libtorch_cuda\.so.*--force-reinstall"):
        stack.check_stack()
