"""Rows in bytes and in half precision: what is read back, against the bound and a scalar reading."""

from __future__ import annotations

import struct

import fbgemm_gpu  # noqa: F401 - registers its ops
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recemb.errors import ConfigError
from recemb.inference.rows import kind_of, read_rows, scales_and_biases, smallest, store_rows
from recemb_kernels.storage import StoredAs

_FLOATS = st.floats(-60000, 60000, width=32)


@given(st.lists(st.lists(_FLOATS, min_size=5, max_size=5), min_size=1, max_size=4))
def test_bytes_read_within_half_a_scale(rows: list[list[float]]) -> None:
    weight = torch.tensor(rows)
    stored = store_rows(weight, StoredAs.INT8, "t: q")
    read, (scale, bias) = read_rows(stored, StoredAs.INT8, 5), scales_and_biases(stored)
    wide = weight.double()
    off = (read.double() - wide).abs()
    rounding = 2**-23 * (255 * scale + bias.abs()).double()
    assert bool((off <= scale.double() / 2 + rounding).all())
    # Outwards: no weight lies beyond the first or the last byte's value.
    assert bool((bias.double() <= wide.amin(1, keepdim=True)).all())
    assert bool((bias.double() + 255 * scale.double() >= wide.amax(1, keepdim=True)).all())
    needed = (wide.amax(1, keepdim=True) - bias.double()) / 255
    assert bool((scale.double() <= needed * (1 + 2**-10) + 2**-24).all())


def test_float32_rounding_counts_in_a_row_of_small_range() -> None:
    weight = 1 + 2**-15 * torch.linspace(0, 1, 64).view(1, -1)
    stored = store_rows(weight, StoredAs.INT8, "t: q")
    scale, bias = scales_and_biases(stored)
    off = float((read_rows(stored, StoredAs.INT8, 64).double() - weight.double()).abs().max())
    assert float(scale) / 2 < off <= float(scale / 2 + 2**-23 * (255 * scale + bias))


def test_bytes_are_scale_times_byte_plus_bias() -> None:
    stored = store_rows(torch.tensor([[-1.0, 0.0, 0.5, 2.0, 1.0, 1.0]]), StoredAs.INT8, "t: q")
    raw = bytes(stored[0].tolist())
    scale, bias = struct.unpack("<ee", raw[6:])
    assert bias == -1.0
    assert [byte * scale + bias for byte in raw[:6]] == pytest.approx(
        read_rows(stored, StoredAs.INT8, 6)[0].tolist(), abs=1e-6
    )
    assert raw[0] == 0
    assert raw[3] >= 254


def test_a_row_of_small_range_loses_no_step() -> None:
    # Near the subnormal halves fbgemm's rounding to nearest is off by several steps at the largest weight.
    weight = torch.linspace(-3e-4, 3e-4, 64).view(1, -1)
    step = 6e-4 / 255
    off = (read_rows(store_rows(weight, StoredAs.INT8, "t: q"), StoredAs.INT8, 64) - weight).abs().max()
    theirs = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(weight, 8)
    nearest = (read_rows(theirs, StoredAs.INT8, 64) - weight).abs().max()
    assert float(off) < 0.6 * step
    assert float(nearest) > 1.1 * step


def test_equal_weights_are_kept() -> None:
    weight = torch.tensor([[0.25] * 8, [0.0] * 8, [-3.5] * 8])
    assert torch.equal(read_rows(store_rows(weight, StoredAs.INT8, "t: q"), StoredAs.INT8, 8), weight)


def test_narrow_rows_take_half_precision() -> None:
    assert [smallest(StoredAs.INT8, width) for width in (1, 4, 5)] == [
        StoredAs.FLOAT16,
        StoredAs.FLOAT16,
        StoredAs.INT8,
    ]


@pytest.mark.parametrize(
    ("weight", "kind", "message"),
    [
        (torch.tensor([[1.0, float("nan")]]), StoredAs.FLOAT32, "table 't': q has a weight of nan"),
        (torch.tensor([[1.0, float("inf")]]), StoredAs.INT8, "must be finite; at most 65504"),
        (torch.tensor([[1.0, -70000.0]]), StoredAs.FLOAT16, "has a weight of 70000.0 in rows 0 to 0"),
    ],
)
def test_weights_that_cannot_be_stored_are_refused(weight: Tensor, kind: StoredAs, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        store_rows(weight, kind, "table 't': q")


def test_dtypes_of_torchrec() -> None:
    bytes_ = (torch.qint8, torch.int8, torch.quint8, torch.uint8)
    assert {kind_of(dtype) for dtype in bytes_} == {StoredAs.INT8}
    with pytest.raises(ConfigError, match=r"torch\.quint4x2: compressed parameters are stored in"):
        kind_of(torch.quint4x2)
