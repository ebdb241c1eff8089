"""How evenly ROBE's hash fills its array. Seeds are fixed, so these are statements, not lotteries."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from recemb.id_maps.hashing import UniversalHash
from recemb.spec import ROBE
from tests.backends.cases import build_tables, table


def starts(
    name: str, rows: int, *, seed: int = 0, dim: int = 16, block_size: int = 4, size: int = 4096
) -> Tensor:
    """[rows, blocks] slots in an array of ``size`` weights."""
    compression = ROBE(compress_rate=rows * dim / size, block_size=block_size, seed=seed)
    backend = build_tables([table(rows, dim, compression, name=name)]).backend(name)
    assert backend.own_parameters()["array"].numel() == size
    return backend.map_ids(torch.arange(rows))


def chi_square_z(counts: Tensor) -> float:
    """Standard score of the chi-square statistic of equal expected counts."""
    expected = float(counts.sum()) / counts.numel()
    statistic = float(((counts.double() - expected) ** 2 / expected).sum())
    freedom = counts.numel() - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("seed", range(12))
def test_consecutive_ids_are_uniform_over_the_array(seed: int) -> None:
    """The hot rows of a log whose ids are in order of frequency.

    A hash that is linear in the row fails this for one seed in nine (seed 1 among them): consecutive rows
    then form an arithmetic progression, which can miss most of the array.
    """
    slots = starts("t_cat_2", 50_000, seed=seed)
    for block in range(slots.shape[1]):
        counts = torch.bincount(slots[:, block], minlength=4096)
        assert chi_square_z(counts) < 8
        assert int((counts == 0).sum()) < 10


def test_pairs_of_rows_collide_once_in_size_over_seeds() -> None:
    """The universal law itself: two rows share a slot for one seed in |M|, whatever the rows are."""
    pairs = [(0, 1), (0, 2**31), (5, 2**40), (123, 4096 + 123), (7, 8)]
    rows = torch.tensor(sorted({row for pair in pairs for row in pair}))
    place = {int(row): k for k, row in enumerate(rows)}
    seeds, size, hits = 4000, 64, 0
    for seed in range(seeds):
        slots = UniversalHash.from_seed(seed, "robe/slot").blocks(99, rows, 1)[:, 0] % size
        hits += sum(int(slots[place[a]] == slots[place[b]]) for a, b in pairs)
    expected = seeds * len(pairs) / size
    assert abs(hits - expected) < 5 * math.sqrt(expected)


def test_scattered_ids_are_uniform_too() -> None:
    """Popular ids of a real log are no arithmetic progression."""
    compression = ROBE(compress_rate=2**40 * 16 / 4096, block_size=4)
    backend = build_tables([table(2**40, 16, compression)]).backend("t")
    ids = torch.randint(2**40, (50_000,), generator=torch.Generator().manual_seed(0))
    slots = backend.map_ids(ids)
    for block in range(4):
        assert abs(chi_square_z(torch.bincount(slots[:, block], minlength=4096))) < 5


@pytest.mark.parametrize(("one", "two"), [("a", "b"), ("t_cat_1", "t_cat_10"), ("t", "T")])
def test_tables_of_a_group_land_on_different_slots(one: str, two: str) -> None:
    same = starts(one, 20_000) == starts(two, 20_000)
    expected = same.numel() / 4096
    assert int(same.sum()) < expected + 6 * math.sqrt(expected)


def test_blocks_of_a_row_land_on_different_slots() -> None:
    slots = starts("t", 20_000)
    for block in range(1, slots.shape[1]):
        same = int((slots[:, block] == slots[:, 0]).sum())
        assert same < 20_000 / 4096 + 6 * math.sqrt(20_000 / 4096)


def test_id_0_is_not_special() -> None:
    """The public ROBE and CCE code sends id 0 to slot 0 for every chunk, table and seed."""
    slots = torch.cat([starts(name, 512, seed=seed)[:1] for name in "abcdefgh" for seed in range(8)])
    assert slots.shape == (64, 4)
    assert int((slots == 0).sum()) <= 2
    assert len(set(slots.flatten().tolist())) > 240


def test_signs_are_balanced_and_independent_of_the_slot() -> None:
    compression = ROBE(compress_rate=50_000 * 16 / 4096, block_size=4, use_sign=True)
    backend = build_tables([table(50_000, 16, compression)]).backend("t")
    slots = backend.map_ids(torch.arange(50_000))
    negative = slots < 0
    assert abs(float(negative.double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(slots.numel())
    start = torch.where(negative, ~slots, slots)
    for half in (start < 2048, start >= 2048, start % 2 == 0, start % 2 == 1):
        share = float(negative[half].double().mean())
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(int(half.sum()))
    plain = build_tables([table(50_000, 16, ROBE(compress_rate=50_000 * 16 / 4096, block_size=4))])
    assert torch.equal(plain.backend("t").map_ids(torch.arange(50_000)), start)


def test_the_order_of_the_tables_does_not_move_a_row() -> None:
    compression = ROBE(compress_rate=4, block_size=4)
    tables = [table(50 + k, 8, compression, name=f"t{k}") for k in range(3)]
    ids = torch.arange(50)
    forward, backward = build_tables(tables), build_tables(tables[::-1])
    for spec in tables:
        assert torch.equal(forward.backend(spec.name).map_ids(ids), backward.backend(spec.name).map_ids(ids))
