"""Occupancy and roofline against figures worked out by hand."""

from __future__ import annotations

import pytest

from recemb_kernels.aot.occupancy import occupancy
from recemb_kernels.aot.roofline import roofline

KIB = 1024


@pytest.mark.parametrize(
    ("arch", "num_warps", "registers", "shared", "blocks", "limited_by"),
    [
        # 32 registers x 32 threads = 1,024 a warp; a quarter SM holds 16,384 / 1,024 = 16 warps: all 64 fit.
        ("sm_80", 4, 32, 0, 16, "warps"),
        # 33 are given out as 40: 1,280 a warp, 12 warps a quarter, 48 an SM.
        ("sm_80", 4, 33, 0, 12, "registers"),
        ("sm_80", 4, 40, 0, 12, "registers"),
        # 80: 2,560 a warp. 65,536 would hold 25 warps, but a quarter holds 6, so the SM 24.
        ("sm_90", 1, 80, 0, 24, "registers"),
        # 64: 2,048 a warp, 8 a quarter, 32 an SM, four blocks of eight.
        ("sm_90", 8, 64, 0, 4, "registers"),
        # 72: 2,304 a warp, 7 a quarter, 28 an SM; a fourth block of eight does not fit.
        ("sm_90", 8, 72, 0, 3, "registers"),
        # 255: 8,192 a warp, 2 a quarter.
        ("sm_80", 1, 255, 0, 8, "registers"),
        # Blocks of one warp: 32 is the most an SM takes, half its warps.
        ("sm_80", 1, 16, 0, 32, "blocks"),
        # 48 KiB and the system's 1 KiB: 164 / 49 = 3, 228 / 49 = 4.
        ("sm_80", 8, 32, 48 * KIB, 3, "shared"),
        ("sm_90", 8, 32, 48 * KIB, 4, "shared"),
        # The most a block may have, and one byte more.
        ("sm_80", 4, 32, 163 * KIB, 1, "shared"),
        ("sm_80", 4, 32, 163 * KIB + 1, 0, "shared"),
        ("sm_90", 4, 32, 227 * KIB, 1, "shared"),
        # 32 warps x 2,304 registers exceed the 65,536 of a block.
        ("sm_90", 32, 65, 0, 0, "registers"),
        ("sm_90", 32, 64, 0, 1, "registers"),
    ],
)
def test_occupancy_worked_by_hand(
    arch: str, num_warps: int, registers: int, shared: int, blocks: int, limited_by: str
) -> None:
    found = occupancy(arch, num_warps, registers, shared)
    assert (found.blocks, found.limited_by) == (blocks, limited_by)
    assert found.fraction == blocks * num_warps / 64


@pytest.mark.parametrize(
    ("arch", "dtype", "flops", "num_bytes", "tensor_cores", "microseconds", "bound"),
    [
        # 10^6 x 2,039 bytes at 2,039 GB/s.
        ("sm_80", "float32", 0.0, 2039.0, False, 1000.0, "memory"),
        ("sm_90", "float32", 0.0, 335.0, False, 100.0, "memory"),
        # 10^6 x 19,500 FLOP at 19.5 TFLOP/s; with tensor cores 156 (TF32), 312 (16-bit).
        ("sm_80", "float32", 19_500.0, 1.0, False, 1000.0, "compute"),
        ("sm_80", "float32", 156_000.0, 1.0, True, 1000.0, "compute"),
        ("sm_80", "bfloat16", 312_000.0, 1.0, True, 1000.0, "compute"),
        ("sm_90", "bfloat16", 67_000.0, 1.0, False, 1000.0, "compute"),
        ("sm_90", "float32", 494_700.0, 1.0, True, 1000.0, "compute"),
        ("sm_90", "float16", 989_000.0, 1.0, True, 1000.0, "compute"),
    ],
)
def test_roofline_worked_by_hand(
    arch: str, dtype: str, flops: float, num_bytes: float, tensor_cores: bool, microseconds: float, bound: str
) -> None:
    found = roofline(arch, dtype, flops, num_bytes, tensor_cores)
    assert found.us_per_million == pytest.approx(microseconds, rel=1e-12)
    assert found.bound == bound
