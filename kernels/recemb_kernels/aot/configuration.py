"""What a kernel author states about one shipped variant of a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Configuration:
    """One shipped variant of a kernel: the arguments it is compiled for and what it may cost.

    A kernel with several tile sizes or warp counts has one configuration for each of them.

    Attributes:
        kernel: name of op and kernel, ``"tt_gather.multiply"``.
        function: the ``triton.jit`` function.
        dtype: storage type of the parameters, one of :data:`DTYPES`.
        signature: Triton type of every argument that is no constant, in order:
            ``{"out": "*fp32", "n": "i64"}``.
        constants: value of every ``tl.constexpr`` argument, and ``None`` for tensors that are not given.
        num_warps: warps (32 threads) a block.
        num_stages: stages of the software pipeline.
        flops_per_lookup: floating-point operations per id looked up, at the shape in ``note``.
        bytes_per_lookup: bytes moved to and from device memory per id looked up, at the shape in ``note``.
        min_occupancy: fraction of the SM's warps below which ``recemb kernels --check`` and a test fail.
        note: the shape, ``"R=32, q=(2,2,4)"``.
        small: pointer arguments of tensors that can never hold 2**31 elements (descriptors of tables), whose
            offsets may be 32-bit.
        aligned: arguments that are multiples of 16: addresses, as torch's allocations are, and integers; when
            ``None`` all pointers but those that the kernel is not compiled by.
        rounds: it multiplies float32 in TF32 because the user has allowed that.
        listed: a README's table has a line for it; the laws hold for all, and the command prints all.
    """

    kernel: str
    function: Any
    dtype: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    flops_per_lookup: float
    bytes_per_lookup: float
    min_occupancy: float
    note: str = ""
    small: tuple[str, ...] = ()
    aligned: tuple[str, ...] | None = None
    rounds: bool = False
    listed: bool = True

    def __post_init__(self) -> None:
        """Refuse what could only fail later, in the compiler, with a message about something else."""
        where = f"configuration of {self.kernel}"
        if self.dtype not in DTYPES:
            raise ValueError(f"{where}: dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        if not 0 < self.min_occupancy <= 1:
            raise ValueError(
                f"{where}: min_occupancy {self.min_occupancy} is no fraction above 0 and up to 1"
            )
        if self.num_warps not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"{where}: num_warps {self.num_warps} is no power of two up to 32")
        if self.flops_per_lookup < 0 or self.bytes_per_lookup <= 0:
            raise ValueError(f"{where}: bytes_per_lookup must be positive and flops_per_lookup not negative")
        if strange := [name for name in self.small if name not in self.pointers]:
            raise ValueError(f"{where}: {', '.join(strange)} is no pointer of the signature")
        if strange := [name for name in self.aligned or () if name not in self.signature]:
            raise ValueError(f"{where}: {', '.join(strange)} is no argument of the signature")
        if twice := sorted(set(self.signature) & set(self.constants)):
            raise ValueError(f"{where}: {', '.join(twice)} is both in the signature and a constant")
        names = tuple(self.function.arg_names)
        given = {*self.signature, *self.constants}
        if set(names) != given:
            missing, extra = set(names) - given, given - set(names)
            raise ValueError(f"{where}: arguments missing: {sorted(missing)}, unknown: {sorted(extra)}")
        # Under TRITON_INTERPRET the function knows its arguments' names alone. An argument that is no
        # constexpr may still be a constant: the JIT makes one of None.
        for parameter in getattr(self.function, "params", ()):
            if parameter.is_constexpr and parameter.name not in self.constants:
                raise ValueError(f"{where}: {parameter.name} is a tl.constexpr and belongs in the constants")

    @property
    def pointers(self) -> tuple[str, ...]:
        """Arguments that are pointers."""
        return tuple(name for name, kind in self.signature.items() if kind.startswith("*"))

    @property
    def label(self) -> str:
        """One line that tells this configuration from the others of the same kernel."""
        shape = f" ({self.note})" if self.note else ""
        return f"{self.kernel}{shape} {self.dtype}, {self.num_warps} warps, {self.num_stages} stages"
