"""Shuffled programs bring to light sums whose order is theirs, and leave others alone."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from recemb_kernels.digit_tree.group import Batch
from recemb_kernels.tt_gather import TrainShape, triton_train
from tests.kernels.triton.harness import assert_bits_without_waiting, assert_near
from tests.kernels.triton.program_order import shuffled_programs
from tests.kernels.triton.test_tt_gather import _tables

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's programs have no order to change")


@triton.jit
def _number_programs(out, count):  # noqa: ANN202
    place = tl.load(count)
    at = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    tl.store(out + at, place)
    tl.store(count, place + 1)


@triton.jit
def _add_slices_in_turn(grad, touched, source, digit, cuts, parts, W: tl.constexpr, BW: tl.constexpr):  # noqa: ANN202
    """``add_slices`` where each node's program adds it, instead of one program those of a slice."""
    n = tl.program_id(0).to(tl.int64)
    if n >= tl.load(cuts + parts):
        return
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    entry = tl.load(digit + n).to(tl.int64)
    tl.store(touched + entry, 1)
    own = tl.load(source + n * W + w, mask=w < W, other=0.0)
    at = grad + entry * W + w
    tl.store(at, tl.load(at, mask=w < W, other=0.0) + own, mask=w < W)


def _places(seed: int | None) -> list[int]:
    """Of each program of a launch: how many run before it."""
    out, count = torch.full((24,), -1), torch.zeros(1, dtype=torch.int64)
    if seed is None:
        _number_programs[2, 3, 4](out, count)
    else:
        with shuffled_programs(seed):
            _number_programs[2, 3, 4](out, count)
    found: list[int] = out.tolist()
    return found


def test_every_program_runs_once_in_another_order() -> None:
    every, found = list(range(24)), [_places(seed) for seed in (0, 0, 1)]
    assert _places(None) == every
    assert [sorted(places) for places in found] == [every] * 3
    assert found[0] == found[1] != found[2]
    assert every not in found


def test_a_sum_in_the_order_of_programs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose numbers are right: of the first core's only slice, of which each of four parts has a node."""
    tables = _tables([TrainShape((1, 8, 3), (2, 1, 2), (1, 2, 3, 1))])
    batch = Batch(torch.arange(24), torch.arange(25), None, 24)
    assert_bits_without_waiting(tables, batch, micro_batch_rows=6)
    monkeypatch.setattr(triton_train, "add_slices", _add_slices_in_turn)
    assert_near(tables, batch, micro_batch_rows=6)
    with pytest.raises(AssertionError):
        assert_bits_without_waiting(tables, batch, micro_batch_rows=6)
