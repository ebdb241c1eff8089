"""Tables stored in half types, all methods in one collection, in the interpreter."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from recemb.backends import native
from tests.kernels.triton.half_types import DTYPES, assert_half_types_are_right
from tests.kernels.triton.harness import by_triton


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_half_types_are_read_and_stepped_on(dtype: torch.dtype, fused: bool) -> None:
    """A GPU's kernels read them, a CPU's train float32 alone."""
    with patch.object(native, "_fits", lambda *_: True), by_triton():
        assert_half_types_are_right(dtype, "cpu", fused)
