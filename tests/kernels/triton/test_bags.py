"""Positions find their bags, whether these are equally long or not, and whatever offsets say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recemb_kernels.triton_frame.plan import Keys, check, keys_of
from tests.kernels.triton.harness import DEVICE

ROWS = 50
FEATURES, SIZE = 3, 300


def _lengths(kind: str) -> Tensor:
    """[F * B] ids of each bag; of several blocks of positions."""
    generator, bags = torch.Generator().manual_seed(3), FEATURES * SIZE
    if kind == "equal":
        return torch.full((bags,), 3)
    if kind == "one at most":
        return torch.randint(0, 2, (bags,), generator=generator)
    if kind == "few and long":
        return 90 * (torch.rand(bags, generator=generator) < 0.02)
    assert kind == "by feature"
    return torch.repeat_interleave(torch.tensor([1, 0, 4]), SIZE)


@pytest.mark.parametrize("kind", ["equal", "one at most", "few and long", "by feature"])
def test_positions_find_their_bags(kind: str) -> None:
    lengths = _lengths(kind)
    offsets = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    ids = torch.arange(int(offsets[-1])) % ROWS
    keys = Keys(
        *(
            torch.tensor(numbers, device=DEVICE)
            for numbers in ([ROWS * f for f in range(FEATURES)], [ROWS] * FEATURES, [0, ROWS * FEATURES])
        ),
        narrow=True,
    )
    key, bag = keys_of(ids.to(DEVICE), offsets.to(DEVICE), keys, SIZE)
    expected = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    assert torch.equal(bag.cpu().long(), expected)
    assert torch.equal(key.cpu().long(), ids + expected // SIZE * ROWS)
    assert not check(ids.to(DEVICE), offsets.to(DEVICE), None, keys.rows, SIZE)
    for at, value in ((0, 5), (SIZE, -(2**40)), (2 * SIZE, 2**40), (FEATURES * SIZE, 0)):
        bad = offsets.clone()
        bad[at] = value
        assert check(ids.to(DEVICE), bad.to(DEVICE), None, keys.rows, SIZE)
        found = keys_of(ids.to(DEVICE), bad.to(DEVICE), keys, SIZE)[1]
        assert 0 <= int(found.min()) <= int(found.max()) < len(lengths), "out of bounds"
