"""How parameters are stored for inference: a kind per parameter, read by the forward of every CPU kernel.

``FLOAT16`` is [rows, W] halves. ``INT8`` is [rows, W + 4] bytes: W of them, then a scale and a bias in half
precision, so that a row is scale * byte + bias: what fbgemm's row-wise quantisation gives. ``TBE_INT8`` is
the same as fbgemm's table-batched embeddings keep it, [rows, W + 4 rounded up to 16] bytes, scale and bias
first.
"""

from __future__ import annotations

from enum import IntEnum

import torch


class StoredAs(IntEnum):
    """The storage of one parameter, in ``recemb_storage.h``'s numbering."""

    FLOAT32 = 0
    FLOAT16 = 1
    INT8 = 2
    TBE_INT8 = 3


# Of every parameter of a table; none for parameters that train, which are float32 on the CPU.
Stored = tuple[StoredAs, ...]

DTYPES = {
    StoredAs.FLOAT32: torch.float32,
    StoredAs.FLOAT16: torch.float16,
    StoredAs.INT8: torch.uint8,
    StoredAs.TBE_INT8: torch.uint8,
}
# Scale and bias.
INT8_EXTRA = 4
_TBE_ALIGNMENT = 16


def constants_of(stored: Stored) -> dict[str, str]:
    """What tells a kernel how its parameters are stored."""
    return {"STORAGE": ",".join(str(int(kind)) for kind in stored)} if stored else {}


def stored_width(kind: StoredAs, width: int) -> int:
    """Elements of ``DTYPES[kind]`` that a row of ``width`` numbers takes."""
    if kind is StoredAs.TBE_INT8:
        return -(-(width + INT8_EXTRA) // _TBE_ALIGNMENT) * _TBE_ALIGNMENT
    return width + INT8_EXTRA if kind is StoredAs.INT8 else width
