"""Rows of parameters in half precision or in bytes, and back.

A row of an INT8 parameter is W bytes u and a scale and a bias in half precision, and reads scale * u + bias:
what fbgemm and torchrec make of one too. Both are rounded outwards, the bias down and the scale up, so that
every weight lies within reach and

    |weight - read| <= scale / 2 + 2**-23 * (255 * scale + |bias|)
    scale <= (1 + 2**-10) * (max - bias) / 255 + 2**-24

with max - bias at most the row's range plus a unit in the last place of its smallest weight, in half
precision. The second term is float32's rounding of scale * u + bias, which counts where a row's range is a
small part of its weights. (Rounded to nearest, as fbgemm does, a row of small range loses several steps where
halves are subnormal.) FLOAT16 reads a weight w within 2**-11 * |w|, or 2**-25 where that is more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from recemb.errors import ConfigError
from recemb_kernels.storage import DTYPES, INT8_EXTRA, StoredAs, stored_width

_KINDS = {
    torch.float32: StoredAs.FLOAT32,
    torch.float16: StoredAs.FLOAT16,
    torch.qint8: StoredAs.INT8,
    torch.quint8: StoredAs.INT8,
    torch.int8: StoredAs.INT8,
    torch.uint8: StoredAs.INT8,
}
_STEPS = 255
_LARGEST = torch.finfo(torch.float16).max
# Elements that are widened to float64 at once.
_BLOCK = 2**22


def kind_of(dtype: torch.dtype) -> StoredAs:
    """What torchrec means by a weight dtype.

    Raises:
        ConfigError: compressed parameters cannot be stored in it.
    """
    if dtype not in _KINDS:
        raise ConfigError(
            f"dtype {dtype}: compressed parameters are stored in torch.int8 (or torch.qint8), torch.float16 "
            "or torch.float32; e.g. dtype=torch.int8"
        )
    return _KINDS[dtype]


def smallest(kind: StoredAs, width: int) -> StoredAs:
    """INT8 only where its scale and bias leave it smaller than half precision, for rows wider than 4."""
    if kind is StoredAs.INT8 and width + INT8_EXTRA >= 2 * width:
        return StoredAs.FLOAT16
    return kind


def store_rows(weight: Tensor, kind: StoredAs, name: str) -> Tensor:
    """[rows, W] floats -> [rows, ``stored_width``] of ``DTYPES[kind]``.

    Args:
        weight: the parameter; on meta only its shape is used.
        kind: how it is stored.
        name: names the parameter in errors.

    Raises:
        ConfigError: a weight is NaN, infinite, or beyond half precision.
    """
    rows, width = weight.shape
    stored = torch.empty(rows, stored_width(kind, width), dtype=DTYPES[kind], device=weight.device)
    if weight.is_meta:
        return stored
    for first, last in _blocks(rows, width):
        block = weight[first:last].detach()
        _check(block, kind, name, first)
        stored[first:last] = _bytes_of(block) if kind is StoredAs.INT8 else block
    return stored


def check_rows(weight: Tensor, kind: StoredAs, name: str) -> None:
    """Raise :class:`ConfigError` where :func:`store_rows` would."""
    for first, last in _blocks(*weight.shape) if not weight.is_meta else ():
        _check(weight[first:last].detach(), kind, name, first)


def _check(block: Tensor, kind: StoredAs, name: str, first: int) -> None:
    largest = block.abs().amax() if block.numel() else block.new_zeros(())
    most = math.inf if kind is StoredAs.FLOAT32 else _LARGEST
    if not bool(torch.isfinite(block).all()) or float(largest) > most:
        limit = f"; at most {most:g} can be stored" if math.isfinite(most) else ""
        raise ConfigError(
            f"{name} has a weight of {float(largest)} in rows {first} to {first + len(block) - 1}; stored "
            f"weights must be finite{limit}"
        )


def read_rows(stored: Tensor, kind: StoredAs, width: int) -> Tensor:
    """The [rows, W] float32 that a look-up reads."""
    if DTYPES[kind] is not torch.uint8:
        return stored.float()
    scale, bias = scales_and_biases(stored, kind)
    first = INT8_EXTRA if kind is StoredAs.TBE_INT8 else 0
    return stored[:, first : first + width].float() * scale + bias


def scales_and_biases(stored: Tensor, kind: StoredAs = StoredAs.INT8) -> tuple[Tensor, Tensor]:
    """[rows, 1] float32 each, of a parameter in bytes."""
    where = slice(INT8_EXTRA) if kind is StoredAs.TBE_INT8 else slice(-INT8_EXTRA, None)
    # A copy: halves begin at an even byte.
    both = stored[:, where].clone(memory_format=torch.contiguous_format).view(torch.float16).float()
    return both[:, :1], both[:, 1:]


def _bytes_of(block: Tensor) -> Tensor:
    wide = block.double()
    bias = _outwards(wide.amin(dim=1, keepdim=True), up=False)
    above = wide - bias.double()
    scale = _outwards(above.amax(dim=1, keepdim=True) / _STEPS, up=True)
    # A row of one value that half precision has is its bias.
    steps = above / torch.where(scale == 0, torch.ones_like(scale), scale).double()
    rounded = steps.round().clamp(0, _STEPS).to(torch.uint8)
    return torch.cat([rounded, scale.view(torch.uint8), bias.view(torch.uint8)], dim=1)


def _outwards(values: Tensor, *, up: bool) -> Tensor:
    """The nearest half at or above (below) each value of float64."""
    sign = 1.0 if up else -1.0
    # Upwards for both: the nearest half, or its neighbour when that is too low.
    aim = values * sign
    near = aim.half()
    bits = near.view(torch.int16)
    # Away from zero a half above 0 has the next number; below 0 the one before, and 0 has the smallest one.
    above = torch.where(near > 0, bits + 1, torch.where(near < 0, bits - 1, torch.ones_like(bits)))
    low = near.double() < aim
    return torch.where(low, above.view(torch.float16), near) * sign


def _blocks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, _BLOCK // max(1, width))
    for first in range(0, rows, step):
        yield first, min(rows, first + step)
