"""``recemb kernels``: its forms of output, its exit codes, its errors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recemb.cli import kernels
from recemb_kernels.aot import registry, tables

Recemb = Callable[..., Any]
SAMPLES = Path(__file__).parents[1] / "kernels" / "aot_samples.py"


@pytest.fixture(autouse=True)
def _as_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests may have set this process up for Triton's interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def _samples(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SAMPLES), "kernels", *words], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def checked() -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, str(SAMPLES), "kernels", "--check"]
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environment)


def test_tables_fit_a_terminal(checked: subprocess.CompletedProcess[str]) -> None:
    lines = checked.stdout.splitlines()
    assert max(len(line) for line in lines) <= 100
    heads = [" ".join(line.split()) for line in lines if line.startswith("  arch")]
    assert heads == [
        "arch dtype warps stages registers spill B shared B occupancy stated limit i32",
        "arch dtype warps MMA FFMA LDG .128 STG .128 LDS STS atom FLOP bytes µs/M bound",
    ]
    assert "samples.gather_wide (D=32)" in lines
    assert sum(line.startswith("  sm_90 ") and "GB/s" not in line for line in lines) == 2 * 8
    assert "  sm_80 A100 SXM 80GB: 2,039 GB/s, fp32 19.5 TFLOP/s, tensor 156 (tf32), 312 (16-bit)" in lines
    assert "  sm_90 H100 SXM 80GB: 3,350 GB/s, fp32 67 TFLOP/s, tensor 494.7 (tf32), 989 (16-bit)" in lines


def test_check_names_each_problem_once(checked: subprocess.CompletedProcess[str]) -> None:
    assert checked.returncode == 1
    lines = checked.stderr.splitlines()
    assert lines[-1] == "8 of 16 compiled kernels keep the laws"
    assert len(lines) == len(set(lines))
    low = "occupancy 12.5% is below the stated 25.0%, limited by registers (sm_80, sm_90)"
    assert f"samples.hoard float32, 1 warps, 2 stages: {low}" in lines


def test_check_passes_clean_kernels_of_one_card() -> None:
    done = _samples("--check", "--kernel", "gather_wide", "--arch", "sm_90", "sm_90")
    assert (done.returncode, done.stderr) == (0, "2 of 2 compiled kernels keep the laws\n")
    assert "A100" not in done.stdout


def test_what_is_only_checked_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"{tables.BEGIN}\n{tables.END}\n", encoding="utf-8")
    words = ("--kernel", "gather_wide", "--write", str(path))
    assert "4 of 4 compiled kernels" in _samples("--check", *words).stderr
    checked = path.read_text(encoding="utf-8")
    assert "samples.gather_wide (D=32)" in checked
    _samples(*words)
    assert path.read_text(encoding="utf-8") == checked


def test_write_replaces_what_stands_between_the_markers(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n", encoding="utf-8")
    words = ("--kernel", "multiply", "--write", str(path))
    assert _samples(*words).stderr == f"written: {path}\n"
    first = path.read_text(encoding="utf-8")
    assert first.startswith(f"before\n{tables.BEGIN}\nWritten by")
    assert first.endswith(f"|\n{tables.END}\nafter\n")
    # One line, the worse of both architectures.
    assert first.count("| samples.multiply |") == 1
    assert "| samples.multiply | bfloat16 | 4 |" in first
    assert "µs/M sm_80 | µs/M sm_90 |" in first
    assert "old" not in first
    _samples(*words)
    assert path.read_text(encoding="utf-8") == first


@pytest.mark.parametrize(
    "text",
    ["", tables.BEGIN, tables.END, f"{tables.END}{tables.BEGIN}", f"{tables.BEGIN}{tables.END}{tables.END}"],
)
def test_write_needs_its_markers(recemb: Recemb, tmp_path: Path, text: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    code, out, err = recemb("kernels", "--write", str(path))
    assert (code, out) == (2, "")
    assert (
        f"--write {path}: must contain <!-- recemb kernels --> and after it <!-- /recemb kernels -->" in err
    )
    assert path.read_text(encoding="utf-8") == text


def test_write_to_a_missing_file(recemb: Recemb, tmp_path: Path) -> None:
    code, _, err = recemb("kernels", "--write", str(tmp_path / "none.md"))
    assert code == 2
    assert "No such file" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--arch", "sm_99"), "invalid choice: 'sm_99'; did you mean sm_90?"),
        (("--arch",), "argument --arch: expected at least one argument"),
        (("--format", "markdown"), "invalid choice: 'markdown'; choose from table, json"),
        (("--kernels", "tt"), "unknown argument --kernels; did you mean --kernel?"),
    ],
)
def test_usage_errors(recemb: Recemb, words: tuple[str, ...], message: str) -> None:
    code, out, err = recemb("kernels", *words)
    assert (code, out) == (2, "")
    assert message in err


def test_no_kernel_of_that_name() -> None:
    done = _samples("--kernel", "scatter")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        "no kernel's name contains 'scatter'; kernels: samples.gather_narrow, samples.gather_wide"
        in done.stderr
    )


def test_nothing_shipped(recemb: Recemb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MODULES", ())
    assert recemb("kernels") == (
        2,
        "",
        "recemb kernels: error: no kernel's name contains ''; kernels: none is shipped yet\n",
    )


def test_without_triton(recemb: Recemb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    code, out, err = recemb("kernels")
    assert (code, out) == (2, "")
    assert "triton is not installed" in err
    assert "pip install 'recemb[gpu]'" in err


def test_under_the_interpreter_it_runs_in_a_process_without(
    recemb: Recemb, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[list[str], dict[str, str]]] = []

    def run(words: list[str], env: dict[str, str], check: bool) -> SimpleNamespace:
        calls.append((words, env))
        return SimpleNamespace(returncode=7)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(subprocess, "run", run)
    flags = ["--arch", "sm_80", "--format", "json", "--kernel=tt", "--check", "--write=README.md"]
    assert recemb("kernels", *flags).code == 7
    words, environment = calls[0]
    assert words == [sys.executable, "-m", "recemb", "kernels", *flags]
    assert "TRITON_INTERPRET" not in environment
