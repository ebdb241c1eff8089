"""bench cache: hit rates of Zipf ids, in order of frequency and shuffled."""

from __future__ import annotations

from bench.cache import build_parser
from bench.cache_steps import step_rows, step_table


def test_hit_rates_do_not_depend_on_how_ids_are_numbered() -> None:
    sizes = "--policies lfu --fractions 0.01 --rows 10000 --batch 256 --steps 160 --rounds 48"
    rows = step_rows(build_parser().parse_args(["--ids", "zipf", "permuted", *sizes.split()]))
    assert [(row.ids, row.policy) for row in rows] == [
        ("zipf", ""),
        ("zipf", "lfu"),
        ("permuted", ""),
        ("permuted", "lfu"),
    ]
    ordered, shuffled = (row for row in rows if row.policy)
    assert ordered.ideal_hit_rate == shuffled.ideal_hit_rate
    for row in (ordered, shuffled):
        assert row.ideal_hit_rate - 0.04 < row.hit_rate <= row.ideal_hit_rate + 0.02
    assert step_table(rows).count("permuted") == 1
