"""Gradients of distinct rows, from those of the places that they have in a sorted batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from recemb_kernels.triton_frame import gradients
from recemb_kernels.triton_frame.family import Call
from recemb_kernels.triton_frame.gradients import Places
from recemb_kernels.triton_frame.launches import PIECE
from recemb_kernels.triton_frame.plan import plan_batch
from tests.kernels.triton.harness import DEVICE

# Beyond 128 columns a row is the work of two programs.
WIDTH = 130


def empty_of_nan(*size: int, **options: Any) -> Tensor:
    return torch.full(size, torch.nan, **options)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read before it is written is no number."""
    names = {**vars(torch), "empty": empty_of_nan}
    monkeypatch.setattr(gradients, "torch", SimpleNamespace(**names))


@settings(derandomize=True, deadline=None, max_examples=5, suppress_health_check=list(HealthCheck))
@given(
    runs=st.lists(st.sampled_from([1, 2, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE]), min_size=1, max_size=8),
    skipped=st.integers(0, PIECE + 1),
    family=st.integers(0, 8),
    rows_at_once=st.integers(1, 5),
)
# A run that begins at a cut, one that ends there, and one with many.
@example([PIECE, PIECE, 5 * PIECE, 1], 0, 0, 1)
@example([1, 2 * PIECE, PIECE - 1, 3], 3, 2, 2)
def test_rows_get_the_sum_over_their_places(
    runs: list[int], skipped: int, family: int, rows_at_once: int
) -> None:
    """Of one family of two, all at once and so many at a time; sums of whole numbers are exact."""
    generator = torch.Generator().manual_seed(len(runs))
    family = min(family, len(runs))
    lengths = torch.tensor([*runs, skipped])
    keys = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    keys = keys[torch.randperm(len(keys), generator=generator)]
    plan = plan_batch(keys.int().to(DEVICE), torch.tensor([0, family, len(runs)], device=DEVICE))
    grad_out = torch.randint(-9, 10, (len(keys), WIDTH), generator=generator).float()
    scale = torch.randint(1, 4, (len(keys),), generator=generator).float()
    expected = torch.zeros(len(lengths), WIDTH).index_add(0, keys, grad_out * scale[:, None])
    order = plan.order.long()
    call = cast(Call, SimpleNamespace(plan=plan))
    places = Places(call, grad_out.to(DEVICE), order * WIDTH, scale.to(DEVICE)[order])
    for first, last in ((0, family), (family, len(runs))):
        own = torch.tensor([first, last], device=DEVICE)
        assert torch.equal(places.rows(own, WIDTH)[first:last].cpu(), expected[first:last])
        for low in range(first, last, rows_at_once):
            high = min(low + rows_at_once, last)
            cuts = torch.tensor([low, high], device=DEVICE)
            sliced = places.rows(cuts, WIDTH, rows_at_once)
            assert torch.equal(sliced[: high - low].cpu(), expected[low:high])
