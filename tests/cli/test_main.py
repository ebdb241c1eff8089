"""The command itself: help, usage errors, exit codes, what it imports."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recemb import __version__
from recemb.cli import doctor, train
from recemb.errors import BatchError, ConfigError, DataError, Interrupted, NonFiniteError

Recemb = Callable[..., Any]
HEAVY = (
    "torch",
    "torchrec",
    "triton",
    "recemb_kernels",
    "numpy",
    "pyarrow",
    "pydantic",
    "yaml",
    "matplotlib",
    "tqdm",
)


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], *([verb, "--help"] for verb in ("train", "report", "prepare", "kernels"))],
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    script = (
        "import sys; from recemb.cli.main import main; code = main(sys.argv[1:]); "
        f"heavy = sorted(set({HEAVY!r}) & set(sys.modules)); print('HEAVY', heavy, code)"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "HEAVY [] 0"


def test_help_takes_at_most_100_ms(tmp_path: Path) -> None:
    # As an installed package, whose modules are compiled.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path)
    times = []
    for _ in range(7):
        start = cpu_seconds()
        subprocess.run(
            [sys.executable, "-m", "recemb", "--help"], env=environment, capture_output=True, check=True
        )
        times.append(cpu_seconds() - start)
    # Its own time, and the fastest: on a shared machine the clock measures the neighbours.
    assert min(times) <= 0.100


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_lists_the_verbs_that_exist(recemb: Recemb) -> None:
    code, out, err = recemb("--help")
    assert (code, err) == (0, "")
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("    ") and line[4] != " "]
    assert listed == ["prepare", "train", "plan", "report", "bench", "kernels", "doctor"]


def test_version(recemb: Recemb) -> None:
    assert recemb("--version") == (0, f"recemb {__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tran"], "invalid choice: 'tran'; did you mean train?"),
        (["xyz"], "invalid choice: 'xyz'; choose from prepare, train, plan, report, bench, kernels, doctor"),
        ([], "the following arguments are required: VERB"),
        (
            ["train", "--bath_size", "3", "--seed", "1"],
            "unknown argument --bath_size; did you mean --batch_size?",
        ),
        (["train", "--seed=1", "--compres_rate=3"], "did you mean --compress_rate?"),
        (
            ["prepare", "--output", "no/such", "--bad_row", "skip"],
            "unknown argument --bad_row; did you mean --bad_rows?",
        ),
        (["train", "--qqqqqq"], "unknown argument --qqqqqq\n"),
        (["train", "stray"], "unknown argument stray"),
        (["train", "--seed"], "argument --seed: expected one argument"),
        (["doctor", "--format", "jsn"], "invalid choice: 'jsn'; did you mean json?"),
        (["report", "run"], "required: --output"),
    ],
)
def test_usage_errors_exit_2_with_a_suggestion(recemb: Recemb, words: list[str], message: str) -> None:
    code, out, err = recemb(*words)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError, 2), (DataError, 3), (BatchError, 3), (NonFiniteError, 5), (Interrupted, 75)],
)
def test_each_error_has_its_exit_code(
    recemb: Recemb, monkeypatch: pytest.MonkeyPatch, error: type[Exception], code: int
) -> None:
    def fail(args: object) -> int:
        raise error("what went wrong")

    monkeypatch.setattr(doctor, "run", fail)
    assert recemb("doctor") == (code, "", "recemb doctor: error: what went wrong\n")


def test_defects_keep_their_traceback(recemb: Recemb, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: object) -> int:
        raise KeyError("defect")

    monkeypatch.setattr(doctor, "run", fail)
    with pytest.raises(KeyError):
        recemb("doctor")


def test_ctrl_c_is_no_traceback(recemb: Recemb, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", fail)
    assert recemb("train") == (130, "", "recemb train: interrupted\n")


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m recemb doctor --format json | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "[\n"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("verb", "code", "said"),
    [("train", 2, "--data_dir: is required"), ("doctor", 1, "a defect of the program")],
)
def test_a_rank_does_not_wait_for_its_interpreter_to_end(verb: str, code: int, said: str) -> None:
    script = (
        "import atexit; from recemb.cli import doctor, main; atexit.register(print, 'interpreter ends')\n"
        "def defect(args): raise KeyError('a defect of the program')\n"
        "doctor.run = defect; main.entry_point()"
    )
    ended = {
        size: subprocess.run(
            [sys.executable, "-c", script, verb],
            env=os.environ | {"WORLD_SIZE": size},
            text=True,
            capture_output=True,
            check=False,
        )
        for size in ("1", "2")
    }
    assert [each.returncode for each in ended.values()] == [code, code]
    assert all(said in each.stderr for each in ended.values())
    assert ["interpreter ends" in each.stdout for each in ended.values()] == [True, False]
