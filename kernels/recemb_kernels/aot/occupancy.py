"""How many warps of a kernel an SM can hold at once, by the rules of CUDA's occupancy calculator.

Limits: CUDA C++ Programming Guide, "Compute Capabilities", table "Technical Specifications per Compute
Capability", columns 8.0 and 9.0; allocation units: NVIDIA's ``cuda_occupancy.h``.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP_THREADS = 32
MAX_REGISTERS_PER_THREAD = 255
_WARPS_PER_SM = 64
_BLOCKS_PER_SM = 32
_REGISTERS_PER_SM = 65_536
# An SM has four schedulers, each with a quarter of the registers; a warp lives on one of them.
_PARTITIONS_PER_SM = 4
# Registers are given to a warp in units of 256, that is 8 a thread.
_REGISTER_UNIT = 256
# Shared memory is given to a block in units of 128 bytes; the system keeps 1 KiB of every block's.
_SHARED_UNIT_BYTES = 128
_SHARED_RESERVED_BYTES = 1024


@dataclass(frozen=True)
class Occupancy:
    """What an SM can hold of a kernel.

    Attributes:
        blocks: resident blocks an SM; 0 when not even one fits.
        fraction: resident warps over the 64 that the SM can hold.
        limited_by: ``"warps"``, ``"blocks"``, ``"registers"`` or ``"shared"``, the first that runs out.
    """

    blocks: int
    fraction: float
    limited_by: str


# Bytes of shared memory an SM offers at its largest carve-out.
SHARED_PER_SM_BYTES = {"sm_80": 164 * 1024, "sm_90": 228 * 1024}


def occupancy(arch: str, num_warps: int, registers: int, shared_bytes: int) -> Occupancy:
    """The occupancy of a kernel.

    Args:
        arch: a key of :data:`SHARED_PER_SM_BYTES`.
        num_warps: warps a block.
        registers: registers a thread.
        shared_bytes: shared memory a block asks for, static and dynamic, without the system's 1 KiB.
    """
    per_warp = _round_up(registers * WARP_THREADS, _REGISTER_UNIT)
    register_warps = _PARTITIONS_PER_SM * (_REGISTERS_PER_SM // _PARTITIONS_PER_SM // max(per_warp, 1))
    # A block's warps are spread over the partitions: its registers count for a multiple of four warps.
    if per_warp * _round_up(num_warps, _PARTITIONS_PER_SM) > _REGISTERS_PER_SM:
        register_warps = 0
    per_block = _round_up(shared_bytes + _SHARED_RESERVED_BYTES, _SHARED_UNIT_BYTES)
    blocks_by = {
        "warps": _WARPS_PER_SM // num_warps,
        "blocks": _BLOCKS_PER_SM,
        "registers": register_warps // num_warps,
        "shared": SHARED_PER_SM_BYTES[arch] // per_block,
    }
    limited_by = min(blocks_by, key=lambda resource: blocks_by[resource])
    blocks = blocks_by[limited_by]
    return Occupancy(blocks, blocks * num_warps / _WARPS_PER_SM, limited_by)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
