"""The smallest change that fits, against trying every value, and what it takes to find it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from recemb.planner.costs import default_costs
from recemb.planner.layout import Unit, prune
from recemb.planner.presets import PRESETS
from recemb.planner.search import fits as planner_fits
from recemb.torchrec_io.planning import change as module
from recemb.torchrec_io.planning.change import Change, _least, _Looking, fitting_changes
from recemb.torchrec_io.planning.planned import Layouts, Ranks, Request, plan_tables
from recemb.torchrec_io.planning.search import units_of
from tests.torchrec_io.planning.models import MIXED, Model

MB = 10**6


def request(hbm: int, ddr: int = MB, world: int = 2, local: int = 1) -> Request:
    return Request(
        tuple(Model(MIXED).tables),
        (3.0,) * len(MIXED),
        32,
        "rowwise_adagrad",
        Ranks(world, local, hbm, ddr, 0.1),
        default_costs("cuda"),
    )


def fits(asked: Request) -> bool:
    return plan_tables(asked).plan is not None


def assert_equal_units(one: list[Unit], other: list[Unit]) -> None:
    assert [unit.name for unit in one] == [unit.name for unit in other]
    for own, theirs in zip(one, other, strict=True):
        assert len(own.options) == len(theirs.options)
        for a, b in zip(own.options, theirs.options, strict=True):
            np.testing.assert_array_equal(a.ms, b.ms)
            np.testing.assert_array_equal(a.storage, b.storage)


def test_layouts_are_those_that_are_planned_whatever_the_storage() -> None:
    layouts = Layouts(request(3 * MB))
    for hbm, ddr in ((3 * MB, MB), (80 * MB, MB), (5 * MB, 900 * MB)):
        planned = plan_tables(request(hbm, ddr))
        assert_equal_units(layouts.units, [prune(unit) for unit in units_of(planned.search_space)])
        np.testing.assert_array_equal(layouts.cluster(hbm, ddr).capacity, planned.cluster.capacity)


def test_each_change_is_the_smallest() -> None:
    asked = request(2 * MB)
    assert not fits(asked)
    found = {change.flag: change for change in fitting_changes(asked, "qr", 4.0, 200, progress=False)}
    assert found.keys() >= {"--hbm", "--world_size"}
    hbm = next(n for n in range(2, 100) if fits(request(n * MB))) * MB
    assert found["--hbm"] == Change("--hbm", hbm, hbm - MB)
    world = next(n for n in range(3, 33) if fits(request(2 * MB, world=n)))
    assert (found["--world_size"].fits, found["--world_size"].smaller) == (world, world - 1)


def preset(name: str, world: int, hbm: int, ddr: int) -> Request:
    asked = PRESETS[name]()
    ranks, batch = Ranks(world, world, hbm, ddr, 0.15), asked.global_batch_size // world
    return Request(
        asked.tables, asked.pooling_factors, batch, "rowwise_adagrad", ranks, default_costs("cuda")
    )


def test_what_fits_fits_in_more_hbm_too() -> None:
    """15.57 GB were planned, 15.6 GB too, and 15.65 to 15.8 GB refused."""
    layouts = Layouts(preset("mlperf_dlrm_dcnv2", 8, 15_700 * MB, 1000 * MB))
    ladder = range(15_510 * MB, 15_900 * MB, 30 * MB)
    found = [planner_fits(layouts.units, layouts.cluster(hbm=hbm)) for hbm in ladder]
    assert found == sorted(found)
    assert found[ladder.index(15_570 * MB) :] == [True] * 11


@pytest.mark.parametrize(
    ("name", "world", "hbm", "ddr"),
    [
        ("mlperf_dlrm_dcnv2", 8, 15_000 * MB, 1000 * MB),
        ("criteo_kaggle", 1, MB, MB),
        ("criteo_kaggle", 5, 200 * MB, MB),
    ],
)
def test_the_hbm_that_is_offered_is_the_least(name: str, world: int, hbm: int, ddr: int) -> None:
    asked = preset(name, world, hbm, ddr)
    change = _Looking(asked, tqdm(disable=True)).storage()
    assert change is not None
    assert change.fits - change.smaller == MB
    for value, fitting in ((change.fits, True), (change.smaller, False), (1.01 * change.fits, True)):
        assert fits(replace(asked, ranks=replace(asked.ranks, hbm=int(value)))) is fitting


@given(
    st.integers(0, 50),
    st.integers(0, 3000),
    st.integers(0, 300),
    st.integers(0, 300),
    st.sampled_from([40, 500, 4000]),
)
def test_the_least_step_is_found_in_few_tries(
    low: int, hopeless: int, gap: int, missed: int, most: int
) -> None:
    """Up to ``low + hopeless`` none fits for sure; from ``least`` on all do, a quick look sees it later."""
    least = low + hopeless + 1 + gap
    tries: list[int] = []

    def look(step: int, thorough: bool) -> bool:
        assert low < step <= most
        assert step > low + hopeless, "what is hopeless is not tried"
        tries.append(step)
        return step >= (least if thorough else least + missed)

    most += low
    found = _least(look, lambda step: step <= low + hopeless, low, most)
    assert found == (least if least <= most else None)
    assert len(tries) <= 3 * np.log2(2 + gap + missed) + 6


def test_what_takes_long_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            assert options["delay"] > 0

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def set_postfix_str(self, text: str, refresh: bool) -> None:
            shown.append(text)

        def update(self) -> None:
            shown.append("update")

    monkeypatch.setattr(module, "tqdm", Bar)
    asked = request(2 * MB)
    fitting_changes(replace(asked, tables=asked.tables[:3], pooling_factors=(3.0,) * 3), "qr", 4.0, 200)
    assert shown[1::2] == ["update"] * (len(shown) // 2)
    assert {text.split()[0] for text in shown[::2]} >= {"--compress_rate", "--hbm", "--world_size"}
