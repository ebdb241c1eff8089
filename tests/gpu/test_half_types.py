"""Tables stored in half types on a GPU against the CPU's float32 of the same numbers."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton.half_types import DTYPES, assert_half_types_are_right

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_half_types_are_read_and_stepped_on(dtype: torch.dtype, fused: bool) -> None:
    assert_half_types_are_right(dtype, "cuda", fused)
