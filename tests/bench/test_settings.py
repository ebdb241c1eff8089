"""The presets: what they measure, and that a target is looked for where it is measured."""

from __future__ import annotations

from itertools import pairwise

import torch

from bench.ids import make_batches
from bench.ours import OurTables, table_specs
from bench.peers import EmptyTables, FunctionalTables, TBETables, absent
from bench.session import case_bytes
from bench.settings import (
    AT_HAND,
    AT_HAND_ROWS,
    BASE,
    DENSE,
    EMPTY,
    FORWARD,
    FUNCTIONAL,
    KAGGLE,
    OP,
    PATHS,
    PRESETS,
    RANKS,
    SPARSE,
    TBE,
    TLTORCH,
    TT,
    Comparison,
    Setting,
    against_peers,
    grid_preset,
    is_ours,
    sample_preset,
    targets_preset,
)
from bench.targets import TARGETS
from bench.work import Work, work

AXES = ("rows", "dim", "batch", "hots", "ids", "optimizer")
TRAINS = tuple(f"{TT}{rank}" for rank in RANKS)


def _values(comparisons: list[Comparison]) -> dict[str, set[object]]:
    return {axis: {getattr(comparison.setting, axis) for comparison in comparisons} for axis in AXES}


def test_ours_are_told_from_peers() -> None:
    assert [is_ours(case) for case in (TBE, "tltorch R=16", f"{TT}16", DENSE)] == [False, False, True, True]
    assert against_peers(f"{TT}16", DENSE) == (TBE, FUNCTIONAL, f"{TT}16", DENSE, f"{TLTORCH}16")


def test_every_preset_starts_with_tbe_and_measures_a_setting_once() -> None:
    for preset in PRESETS.values():
        comparisons = preset()
        assert len({comparison.setting for comparison in comparisons}) == len(comparisons)
        assert all(comparison.cases[0] == TBE for comparison in comparisons)


def test_the_targets_preset_measures_every_target() -> None:
    measured = {
        (comparison.setting, case, path)
        for comparison in targets_preset()
        for case in comparison.cases
        for path in comparison.paths
    }
    assert set(TARGETS) <= measured


def test_the_targets_preset_has_inference_of_every_case_and_tltorch_beside_every_train() -> None:
    for setting, cases, paths in (vars(comparison).values() for comparison in targets_preset()):
        assert set(paths) == set(PATHS)
        assert FUNCTIONAL in cases
        assert absent(FUNCTIONAL, setting) is None
        for case in cases:
            if case.startswith(TT):
                peer = TLTORCH + case.removeprefix(TT)
                assert peer in cases
                assert "it gathers" not in str(absent(peer, setting))
                assert TARGETS[setting, peer, OP].text() == ">=20"


def test_the_grid_is_all_combinations() -> None:
    comparisons = grid_preset()
    assert len(comparisons) == 4 * 3 * 3 * 2 * 3 * 2
    assert {comparison.cases for comparison in comparisons} == {comparisons[0].cases}
    assert {*TRAINS, TBE, FUNCTIONAL, SPARSE, *(f"{TLTORCH}{rank}" for rank in RANKS)} < set(
        comparisons[0].cases
    )
    # Neighbours share tables: each kind is built once.
    keys = [comparison.setting.tables_key for comparison in comparisons]
    assert sum(a != b for a, b in pairwise(keys)) == len(set(keys)) - 1


def test_the_sample_takes_in_every_value_of_the_grid() -> None:
    sample, whole = sample_preset(), grid_preset()
    assert _values(sample) == _values(whole)
    assert {comparison.setting for comparison in sample} <= {comparison.setting for comparison in whole}
    assert len(sample) == 12
    for comparison in sample:
        assert set(TRAINS) < set(comparison.cases)
        assert comparison.paths == (OP, FORWARD)
    large = {(s.rows[0], s.hots) for s in (comparison.setting for comparison in sample) if s.dim == 128}
    assert {(100_000, 1), (10**6, 20), (10**9, 1)} <= large


def test_an_empty_step_computes_nothing_and_is_recorded() -> None:
    setting = Setting(rows=(50,), dim=8, batch=5, hots=3)
    (batch, *_) = make_batches(setting)
    empty = EmptyTables(setting.dim)
    empty.steps[OP](batch)
    assert empty.parameter.grad is None
    assert work(EMPTY, OP, setting, [batch]) == Work(0, 0, 0)
    assert case_bytes(EMPTY, setting) == 0
    (small,) = (comparison for comparison in targets_preset() if comparison.setting.batch == 64)
    assert {EMPTY, SPARSE} < set(small.cases)


def test_rows_at_hand_are_the_batch_s_alone_and_as_often() -> None:
    setting = Setting(rows=(50, 10**6), dim=8, batch=40, hots=3)
    (batch, *_) = make_batches(setting)
    for ids, places in zip(batch.ids.chunk(2), batch.places.chunk(2), strict=True):
        distinct, counts = ids.unique(return_counts=True)
        assert torch.equal(distinct[places], ids)
        assert torch.equal(places.bincount(), counts)
    ours = OurTables(AT_HAND, setting.rows, setting.dim, setting.optimizer)
    assert torch.equal(ours._ids(batch), batch.places)
    assert [spec.num_embeddings for spec in table_specs(AT_HAND, setting.rows, 8)] == [50, AT_HAND_ROWS]
    assert work(AT_HAND, OP, setting, [batch]) == work(DENSE, OP, setting, [batch])
    for comparison in targets_preset():
        assert comparison.setting.batch * comparison.setting.hots <= AT_HAND_ROWS


def test_bytes_of_peers() -> None:
    setting = Setting(rows=(1000,), dim=16)
    assert case_bytes(TBE, setting) == case_bytes(SPARSE, setting) == 64_000
    assert case_bytes(FUNCTIONAL, setting) == 0
    assert case_bytes(f"{TLTORCH}16", BASE) == case_bytes(f"{TT}16", BASE)
    assert absent(SPARSE, KAGGLE) == "one table only"


def test_embedding_bag_looks_up_every_table() -> None:
    setting = Setting(rows=(50, 7, 300), dim=8, batch=5, hots=3)
    (batch, *_) = make_batches(setting)
    tbe = TBETables(setting.rows, setting.dim, setting.optimizer)
    pooled = FunctionalTables(tbe).steps[FORWARD](batch)
    expected = tbe.collection.tables(batch.ids, batch.offsets)
    torch.testing.assert_close(torch.cat(pooled, 1), expected)  # type: ignore[call-overload]
