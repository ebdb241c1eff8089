"""The comparison of steps sees a learning rate that is off by a tenth: of each op, type and optimizer."""

from __future__ import annotations

import pytest
import torch

from recemb_kernels.digit_tree.group import FeatureCode
from recemb_kernels.triton_frame import steps
from recemb_kernels.update import Kind, Update
from tests.kernels.triton import test_pooled_gather, test_robe_gather, test_tt_gather
from tests.kernels.triton.harness import DTYPES, KINDS, Tables, assert_same_steps, make_batch

OPS = {
    "tt": test_tt_gather._tables(test_tt_gather.SHAPES[1:2]),
    "pooled": test_pooled_gather._tables(test_pooled_gather.SHAPES[1:2]),
    "robe": test_robe_gather._tables(test_robe_gather.SHAPES[1:2], [FeatureCode(0, False)]),
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tables", OPS.values(), ids=OPS)
def test_a_rate_off_by_a_tenth_is_seen(
    tables: Tables, dtype: torch.dtype, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = steps._rates

    def off(update: Update, which: int) -> list[float]:
        rate, *others = right(update, which)
        return [1.1 * rate, *others]

    monkeypatch.setattr(steps, "_rates", off)
    batch = make_batch(tables, 3, 3, most=60)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_steps(tables, batch, [kind], dtype=dtype)
