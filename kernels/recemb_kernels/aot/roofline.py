"""The least time a kernel can take on a card, from the card's datasheet alone.

It is a floor: no cache, no latency, every byte once. A kernel whose rows stay in L2 can beat the memory term.
"""

from __future__ import annotations

from dataclasses import dataclass

LOOKUPS = 1_000_000
_MICROSECONDS = 1e6


@dataclass(frozen=True)
class Card:
    """A card's datasheet.

    Attributes:
        name: as the datasheet has it.
        bytes_per_second: bandwidth of device memory.
        flops: floating-point operations a second without tensor cores, float32.
        tensor_flops: the same of the tensor cores, dense, by storage dtype; float32 runs on them as TF32.
    """

    name: str
    bytes_per_second: float
    flops: float
    tensor_flops: dict[str, float]


# NVIDIA A100 Tensor Core GPU datasheet (2022), column "A100 80GB SXM"; NVIDIA H100 Tensor Core GPU datasheet
# (2023), column "H100 SXM". The H100 sheet gives tensor figures with sparsity: halved here to dense.
CARDS = {
    "sm_80": Card(
        "A100 SXM 80GB", 2_039e9, 19.5e12, {"float32": 156e12, "bfloat16": 312e12, "float16": 312e12}
    ),
    "sm_90": Card(
        "H100 SXM 80GB", 3_350e9, 67e12, {"float32": 494.7e12, "bfloat16": 989e12, "float16": 989e12}
    ),
}


@dataclass(frozen=True)
class Roofline:
    """The floor of a kernel's time.

    Attributes:
        us_per_million: microseconds a million look-ups.
        bound: ``"memory"`` or ``"compute"``, whichever takes longer.
    """

    us_per_million: float
    bound: str


def roofline(arch: str, dtype: str, flops: float, num_bytes: float, tensor_cores: bool) -> Roofline:
    """The floor of a million look-ups.

    Args:
        arch: a key of :data:`CARDS`.
        dtype: storage type of the parameters, which decides the tensor cores' peak.
        flops: floating-point operations a look-up.
        num_bytes: bytes moved a look-up.
        tensor_cores: whether the machine code uses them.
    """
    card = CARDS[arch]
    memory = num_bytes / card.bytes_per_second
    compute = flops / (card.tensor_flops[dtype] if tensor_cores else card.flops)
    bound = "compute" if compute > memory else "memory"
    return Roofline(max(memory, compute) * LOOKUPS * _MICROSECONDS, bound)
