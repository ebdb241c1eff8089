"""The report: one row a configuration and architecture, with everything that the tables and the JSON show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from recemb_kernels.aot.addresses import narrow_offsets
from recemb_kernels.aot.compile import Binary, compile_one, for_all
from recemb_kernels.aot.configuration import Configuration
from recemb_kernels.aot.occupancy import Occupancy, occupancy
from recemb_kernels.aot.roofline import Roofline, roofline
from recemb_kernels.aot.sass import MachineCode, read

# Kernels that are disassembled together.
_AT_ONCE = 32


@dataclass(frozen=True)
class Row:
    """What one compiled configuration costs.

    Attributes:
        configuration: what was compiled.
        arch: for which architecture.
        code: registers, spills and instruction counts.
        shared_bytes: shared memory a block.
        occupancy: resident warps an SM.
        roofline: the floor of its time.
        narrow: address arithmetic that 32 bits could be too few for.
    """

    configuration: Configuration
    arch: str
    code: MachineCode
    shared_bytes: int
    occupancy: Occupancy
    roofline: Roofline
    narrow: list[str]

    @property
    def problems(self) -> list[str]:
        """What breaks the laws of a shipped kernel.

        No spills, the stated occupancy, 64-bit addresses, and float32 that is not rounded to TF32 unasked.
        """
        found = []
        if self.code.spill_bytes:
            found.append(f"spills {self.code.spill_bytes} bytes a thread")
        if self.occupancy.fraction < self.configuration.min_occupancy:
            found.append(
                f"occupancy {self.occupancy.fraction:.1%} is below the stated "
                f"{self.configuration.min_occupancy:.1%}, limited by {self.occupancy.limited_by}"
            )
        exact = self.configuration.dtype == "float32" and not self.configuration.rounds
        if exact and self.code.instructions["tensor_core"]:
            found.append("multiplies float32 on the tensor cores, which round it to TF32")
        return [*found, *self.narrow]

    def as_json(self) -> dict[str, Any]:
        """Plain values: the ten figures of the report first, then what explains them.

        Units: registers a thread, spill_bytes a thread, shared_bytes a block, occupancy a fraction, the
        roofline in microseconds a million look-ups.
        """
        configuration = self.configuration
        return {
            "kernel": configuration.kernel,
            "arch": self.arch,
            "dtype": configuration.dtype,
            "registers": self.code.registers,
            "spill_bytes": self.code.spill_bytes,
            "shared_bytes": self.shared_bytes,
            "occupancy": self.occupancy.fraction,
            "flops_per_lookup": configuration.flops_per_lookup,
            "bytes_per_lookup": configuration.bytes_per_lookup,
            "roofline_us_per_million": self.roofline.us_per_million,
            "roofline_bound": self.roofline.bound,
            "note": configuration.note,
            "num_warps": configuration.num_warps,
            "num_stages": configuration.num_stages,
            "min_occupancy": configuration.min_occupancy,
            "occupancy_limited_by": self.occupancy.limited_by,
            "blocks_per_sm": self.occupancy.blocks,
            "i32_offsets": len(self.narrow),
            "instructions": self.code.instructions,
            "rounds": self.configuration.rounds,
            "problems": self.problems,
        }


def report(
    configurations: Sequence[Configuration],
    archs: Sequence[str],
    threads: int = 2,
    done: Callable[[], None] = lambda: None,
) -> list[Row]:
    """A row for every configuration and architecture, in the given order.

    Args:
        configurations: what to examine.
        archs: ``"sm_80"``, ``"sm_90"``.
        threads: compilations at once.
        done: called after each compilation.

    Raises:
        CompileError: a configuration does not compile, or the disassemblers do not run.
    """
    compiled = for_all(_compile, configurations, archs, threads, done)
    # By architecture, some at once: (architecture, places in ``compiled``).
    parts = [
        (arch, range(first + k, len(compiled), len(archs))[:_AT_ONCE])
        for k, arch in enumerate(archs)
        for first in range(0, len(compiled), _AT_ONCE * len(archs))
    ]
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda part: read([compiled[i][0].cubin for i in part[1]], part[0]), parts)
        codes = {
            i: code
            for (_, own), each in zip(parts, found, strict=True)
            for i, code in zip(own, each, strict=True)
        }
    return [_row(binary, narrow, codes[i]) for i, (binary, narrow) in enumerate(compiled)]


def _compile(configuration: Configuration, arch: str) -> tuple[Binary, list[str]]:
    """A configuration's binary, and its narrow offsets."""
    binary = compile_one(configuration, arch)
    return binary, narrow_offsets(binary.ttir, configuration.small)


def _row(binary: Binary, narrow: list[str], code: MachineCode) -> Row:
    configuration, arch = binary.configuration, binary.arch
    return Row(
        configuration,
        arch,
        code,
        binary.shared_bytes,
        occupancy(arch, configuration.num_warps, code.registers, binary.shared_bytes),
        roofline(
            arch,
            configuration.dtype,
            configuration.flops_per_lookup,
            configuration.bytes_per_lookup,
            code.instructions["tensor_core"] > 0,
        ),
        narrow,
    )
