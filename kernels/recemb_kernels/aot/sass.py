"""Reads machine code: how many instructions of which kind, how many registers, how much is spilled.

Counts are static, instructions in the code, not executed ones. The disassemblers come in Triton's wheel.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from triton import knobs

from recemb_kernels.aot.compile import CompileError

# "/*0110*/  @!P0 LDG.E.128.CONSTANT R4, ..." -> "0110", "LDG.E.128.CONSTANT"
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)")
_REGISTERS = re.compile(r"\bREG:(\d+)")
_WIDTH = re.compile(r"\.[US]?(8|16|32|64|128)\b")
_WORD_BITS = 32
# nvdisasm's names of what Triton compiles for; sm_90's has the instructions that only an H100 has.
_MACHINES = {"sm_80": "SM80", "sm_90": "SM90a"}
# Of a 64-bit ELF file: place in the header and format of the section table, and of each section's header.
_TABLE, _SIZES, _SECTION = (40, "<Q"), (58, "<HHH"), "<IIQQQQ"
_TENSOR_CORE = ("HMMA", "HGMMA", "IMMA", "IGMMA", "DMMA", "QGMMA", "BMMA", "BGMMA")
# Opcodes by the name under which they are counted. LDGSTS copies global to shared memory (cp.async).
_KINDS = {
    "ldg": ("LDG",),
    "ldgsts": ("LDGSTS",),
    "stg": ("STG",),
    "lds": ("LDS", "LDSM"),
    "sts": ("STS", "STSM"),
    "ldl": ("LDL",),
    "stl": ("STL",),
    "atomic": ("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDS"),
    "ffma": ("FFMA", "FFMA2"),
    "tensor_core": _TENSOR_CORE,
}


@dataclass(frozen=True)
class MachineCode:
    """What the machine code of one kernel says.

    Attributes:
        registers: registers a thread.
        spill_bytes: bytes a thread stores to and loads from local memory, as ptxas counts them: each
            instruction once. Triton has no local arrays, so local memory is spilled registers.
        instructions: counts by kind: ``tensor_core, ldg, ldgsts, ldg_128, ldg_64, ldg_32, ldg_16, ldg_8, stg,
            stg_128 ... stg_8, lds, sts, ldl, stl, atomic, ffma, total``; ``ldg_128`` counts both the ``ldg``
            and the ``ldgsts`` that move 128 bits a thread.
    """

    registers: int
    spill_bytes: int
    instructions: dict[str, int]


def read(cubins: Sequence[bytes], arch: str) -> list[MachineCode]:
    """Disassemble cubins that hold one kernel each, in one run: its start takes as long as twenty kernels.

    Args:
        cubins: ELF files.
        arch: what they were compiled for, ``"sm_80"`` or ``"sm_90"``.

    Raises:
        CompileError: a disassembler is missing or fails.
    """
    codes = [b"".join(_code(cubin)) for cubin in cubins]
    ends = list(accumulate(map(len, codes)))
    opcodes: list[list[str]] = [[] for _ in cubins]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        registers = [_registers(cubin, path) for cubin in cubins]
        path.write_bytes(b"".join(codes))
        # Data flow, which takes a quarter of the time, only adds marks of last uses.
        text = _run("nvdisasm", "--no-dataflow", "--binary", _MACHINES[arch], str(path))
    for at, opcode in _INSTRUCTION.findall(text):
        opcodes[bisect_right(ends, int(at, 16))].append(opcode)
    return [count(own, number) for own, number in zip(opcodes, registers, strict=True)]


def _code(cubin: bytes) -> Iterator[bytes]:
    """The sections of a cubin that hold machine code."""
    (table,) = struct.unpack_from(_TABLE[1], cubin, _TABLE[0])
    size, number, names = struct.unpack_from(_SIZES[1], cubin, _SIZES[0])
    headers = [struct.unpack_from(_SECTION, cubin, table + k * size) for k in range(number)]
    for name, _, _, _, offset, length in headers:
        if cubin.startswith(b".text.", headers[names][4] + name):
            yield cubin[offset : offset + length]


def _registers(cubin: bytes, path: Path) -> int:
    path.write_bytes(cubin)
    usage = _run("cuobjdump", "--dump-resource-usage", str(path))
    found = _REGISTERS.search(usage)
    if found is None:
        raise CompileError(f"cuobjdump names no register count: {usage.strip()[:200]!r}")
    return int(found[1])


def count(opcodes: Sequence[str], registers: int) -> MachineCode:
    """Count the instructions of one kernel."""
    kinds = {name: kind for kind, names in _KINDS.items() for name in names}
    counts: Counter[str] = Counter({"total": len(opcodes)})
    spill_bytes = 0
    for opcode in opcodes:
        kind = kinds.get(opcode.split(".")[0])
        if kind is None:
            continue
        counts[kind] += 1
        if kind in ("ldg", "ldgsts", "stg"):
            counts[f"{kind[:3]}_{_width(opcode)}"] += 1
        elif kind in ("ldl", "stl"):
            spill_bytes += _width(opcode) // 8
    widths = [f"_{width}" for width in (128, 64, 32, 16, 8)]
    order = ["tensor_core", "ldg", "ldgsts", *(f"ldg{width}" for width in widths)]
    order += [
        *(f"stg{width}" for width in ("", *widths)),
        "lds",
        "sts",
        "ldl",
        "stl",
        "atomic",
        "ffma",
        "total",
    ]
    return MachineCode(registers, spill_bytes, {kind: counts[kind] for kind in order})


def _width(opcode: str) -> int:
    """Bits a thread moves with this load or store; an opcode without a width moves one word."""
    found = _WIDTH.search(opcode)
    return int(found[1]) if found else _WORD_BITS


def _run(tool: str, *words: str) -> str:
    try:
        path = getattr(knobs.nvidia, tool).path
        return subprocess.run([path, *words], capture_output=True, text=True, check=True).stdout
    except subprocess.CalledProcessError as error:
        raise CompileError(f"{tool} failed: {error.stderr.strip()[:500]}") from error
    except (RuntimeError, OSError) as error:
        raise CompileError(f"{tool} of Triton's wheel does not run: {error}") from error
