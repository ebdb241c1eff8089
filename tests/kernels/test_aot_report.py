"""The report on sample kernels whose costs are known, compiled in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from recemb_kernels.aot import registry
from recemb_kernels.aot.configuration import Configuration
from recemb_kernels.aot.occupancy import Occupancy
from recemb_kernels.aot.report import Row
from recemb_kernels.aot.roofline import Roofline
from recemb_kernels.aot.sass import MachineCode

SAMPLES = Path(__file__).with_name("aot_samples.py")
KEYS = [
    *("kernel", "arch", "dtype", "registers", "spill_bytes", "shared_bytes", "occupancy"),
    *("flops_per_lookup", "bytes_per_lookup", "roofline_us_per_million"),
]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, str(SAMPLES), "kernels", "--format", "json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def _of(rows: list[dict[str, Any]], kernel: str) -> Iterator[dict[str, Any]]:
    found = [row for row in rows if row["kernel"] == f"samples.{kernel}"]
    assert {row["arch"] for row in found} == {"sm_80", "sm_90"}
    yield from found


def test_keys_and_order(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 2 * 7
    assert all(list(row)[: len(KEYS)] == KEYS for row in rows)
    assert [row["arch"] for row in rows] == ["sm_80", "sm_90"] * 7


def test_tensor_cores_are_counted(rows: list[dict[str, Any]]) -> None:
    by_arch = {row["arch"]: row["instructions"] for row in _of(rows, "multiply")}
    # HMMA.16816 does 16 x 8 x 16, each of four warps its share of 64 x 64 x 64; HGMMA 64 x 64 x 16 at once.
    assert by_arch["sm_80"]["tensor_core"] == 64**3 // (16 * 8 * 16) // 4
    assert by_arch["sm_90"]["tensor_core"] == 64 // 16
    for instructions in by_arch.values():
        # 64 x 64 numbers by 128 threads, 16 bytes at once: two bf16 loads of 8, one fp32 store of 4.
        assert (
            instructions["ldg_128"] + instructions["stg_128"] == 2 * 64 * 64 // 128 // 8 + 64 * 64 // 128 // 4
        )
        assert instructions["lds"] > 0
        assert instructions["sts"] > 0
    assert all(row["instructions"]["tensor_core"] == 0 for row in _of(rows, "gather_wide"))


def test_float32_on_tensor_cores_is_a_problem() -> None:
    for dtype, expected in (("float32", 1), ("bfloat16", 0)):
        code = MachineCode(32, 0, {"tensor_core": 4})
        enough = Occupancy(16, 1.0, "warps")
        row = Row(_configuration(dtype=dtype), "sm_90", code, 0, enough, Roofline(1.0, "memory"), [])
        assert len(row.problems) == expected
        assert all("TF32" in problem for problem in row.problems)
        assert replace(row, configuration=_configuration(dtype=dtype, rounds=True)).problems == []


def test_tensor_cores_decide_the_roofline(rows: list[dict[str, Any]]) -> None:
    by_arch = {row["arch"]: row["roofline_us_per_million"] for row in _of(rows, "multiply")}
    assert by_arch == pytest.approx({"sm_80": 2 * 64**3 / 312e12 * 1e12, "sm_90": 2 * 64**3 / 989e12 * 1e12})
    assert all(row["roofline_bound"] == "compute" for row in _of(rows, "multiply"))
    for row in _of(rows, "gather_wide"):
        bandwidth = {"sm_80": 2_039e9, "sm_90": 3_350e9}[row["arch"]]
        assert row["roofline_us_per_million"] == pytest.approx(136 / bandwidth * 1e12)


def test_spills_are_reported(rows: list[dict[str, Any]]) -> None:
    for row in _of(rows, "hoard"):
        assert row["registers"] == 255
        assert row["occupancy"] == 8 / 64
        assert row["instructions"]["ldl"] > 0
        assert row["instructions"]["stl"] > 0
        # Each spilled word is 4 bytes stored and 4 loaded; wide instructions move up to four.
        assert row["spill_bytes"] >= 4 * (row["instructions"]["ldl"] + row["instructions"]["stl"])
        assert row["problems"] == [
            f"spills {row['spill_bytes']} bytes a thread",
            "occupancy 12.5% is below the stated 25.0%, limited by registers",
        ]
    assert all(row["spill_bytes"] == 0 for row in rows if row["kernel"] != "samples.hoard")


def test_spill_bytes_are_the_compilers_own(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    script = (
        "import re, subprocess, sys, aot_samples\n"
        "from triton import knobs\n"
        "from recemb_kernels.aot.compile import compile_one\n"
        "binary = compile_one(aot_samples.shipped()[-1], 'sm_80')\n"
        "open(sys.argv[1], 'w').write(binary.ptx)\n"
        "words = [knobs.nvidia.ptxas.path, '-v', '-lineinfo', '--regAllocOptLevel=2', '--gpu-name=sm_80']\n"
        "words += [sys.argv[1], '-o', sys.argv[1] + '.o']\n"
        "log = subprocess.run(words, capture_output=True, text=True).stderr\n"
        "print(sum(int(number) for number in re.findall(r'(\\d+) bytes spill', log)))\n"
    )
    path = os.pathsep.join([str(SAMPLES.parent), *(entry for entry in sys.path if entry)])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "hoard.ptx")],
        capture_output=True,
        text=True,
        check=True,
        env={**environment, "PYTHONPATH": path},
    )
    expected = next(row["spill_bytes"] for row in _of(rows, "hoard") if row["arch"] == "sm_80")
    assert int(done.stdout) == expected


def test_32_bit_addresses_are_caught(rows: list[dict[str, Any]]) -> None:
    for kernel in ("gather_wide", "wander", "multiply", "hoard"):
        assert [row["i32_offsets"] for row in _of(rows, kernel)] == [0, 0]
    narrow = {(row["note"], row["arch"]): row["problems"] for row in _of(rows, "gather_narrow")}
    for arch in ("sm_80", "sm_90"):
        assert [_into(problem) for problem in narrow["D=32", arch]] == ["rows", "weight", "out"]
        assert [_into(problem) for problem in narrow["D=32, out small", arch]] == ["rows", "weight"]
    for row in _of(rows, "wander_narrow"):
        assert [_into(problem) for problem in row["problems"]] == ["rows", "unknown", "out"]
        assert all(problem.startswith("aot_samples.py:") for problem in row["problems"])


def _into(problem: str) -> str:
    return "unknown" if "unknown origin" in problem else problem.split("argument ")[1].split()[0]


def test_interpreted_kernels_are_refused() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import aot_samples as s, recemb_kernels.aot.compile as c; "
            "c.compile_one(s.shipped()[0], 'sm_80')",
        ],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join([str(SAMPLES.parent), *(entry for entry in sys.path if entry)]),
        },
    )
    assert "defined under TRITON_INTERPRET=1; unset it" in done.stderr


def _configuration(**changes: Any) -> Configuration:
    given: dict[str, Any] = {
        "kernel": "op.kernel",
        "function": SimpleNamespace(arg_names=["out", "n", "D"]),
        "dtype": "float32",
        "signature": {"out": "*fp32", "n": "i64"},
        "constants": {"D": 16},
        "num_warps": 4,
        "num_stages": 2,
        "flops_per_lookup": 16.0,
        "bytes_per_lookup": 64.0,
        "min_occupancy": 0.5,
    }
    return Configuration(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "fp32"}, "dtype 'fp32' is none of float32, bfloat16, float16"),
        ({"min_occupancy": 50}, "min_occupancy 50 is no fraction"),
        ({"num_warps": 3}, "num_warps 3 is no power of two"),
        ({"bytes_per_lookup": 0}, "bytes_per_lookup must be positive"),
        ({"small": ("n",)}, "n is no pointer of the signature"),
        ({"aligned": ("other",)}, "other is no argument of the signature"),
        ({"constants": {"D": 16, "n": 1}}, "n is both in the signature and a constant"),
        ({"constants": {"E": 16}}, r"arguments missing: \['D'\], unknown: \['E'\]"),
    ],
)
def test_configurations_validate_themselves(changes: dict[str, Any], message: str) -> None:
    assert _configuration().pointers == ("out",)
    with pytest.raises(ValueError, match=f"configuration of op.kernel: .*{message}"):
        _configuration(**changes)


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a module of the registry that ships the given configurations."""

    def make(*configurations: Configuration) -> None:
        module = ModuleType("offered")
        module.__dict__["shipped"] = lambda: list(configurations)
        monkeypatch.setitem(sys.modules, "offered", module)
        monkeypatch.setattr(registry, "MODULES", ("offered",))

    return make


def test_registry_bounds_the_variants(offer: Any) -> None:
    variants = [_configuration(constants={"D": 2**n}) for n in range(registry.MAX_VARIANTS + 1)]
    offer(*variants[:-1])
    assert registry.shipped() == variants[:-1]
    offer(*variants)
    with pytest.raises(ValueError, match=r"more than 2 variants .*op\.kernel"):
        registry.shipped()
    offer(*variants[:2], variants[0])
    with pytest.raises(ValueError, match=r"shipped twice: .*op\.kernel"):
        registry.shipped()


def test_registry_misses_no_module_silently() -> None:
    with pytest.raises(ImportError, match="no_such_op"):
        registry.shipped(("recemb_kernels.no_such_op.triton_kernel",))
