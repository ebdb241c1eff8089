"""``bench.scaling``: the bytes that ranks send are those of the design."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.distributed as dist

from bench.scaling import Asked, build_parser, main, rows_of, run_ranks, table
from bench.scaling_rank import MODELS
from bench.traffic import ID_BYTES, Traffic, expected, linked


def test_what_the_tables_send_is_what_the_design_says() -> None:
    scale = Fraction(1, 1000)
    found = {
        processes: run_ranks(processes, Asked(processes, list(MODELS), 64 // processes, 1, str(scale), 2))
        for processes in (1, 2)
    }
    for one in found[1][0]:
        assert Traffic(**one["traffic"]).total == 0 == Traffic(**one["expected"]).total
    for rank in found[2]:
        for one in rank:
            traffic, design = Traffic(**one["traffic"]), Traffic(**one["expected"])
            assert traffic.pooled == design.pooled > 0
            assert traffic.reduced == design.reduced
            # Beside ids and lengths go the sizes of messages: a few numbers a feature and rank.
            assert design.integers <= traffic.integers <= design.integers + 26 * 4 * ID_BYTES
    rows = rows_of(found, 1, 64)
    assert [row.processes for row in rows] == [1] * len(MODELS) + [2] * len(MODELS)
    assert all(row.p50_us > 0 for row in rows)
    assert all(len(line) <= 100 for line in table(rows).splitlines())


def test_the_design_by_hand() -> None:
    # Two ranks; tables on 0, 0, 1 and everywhere; 10 samples a rank, 4 columns, 3 ids a bag.
    found = expected(0, 2, 10, 4, 3, [0, 0, 1, None], 100)
    assert found.integers == 10 * (3 + 1) * 8
    assert found.pooled == 10 * 4 * 4 * (2 + 1)
    assert found.reduced == 100


def test_a_simulated_link_is_one_after_the_other_and_frees_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, slept = [0.0], []

    class Done:
        def wait(self) -> None:
            return None

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr("bench.traffic.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("bench.traffic.time.sleep", sleep)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(dist, "all_to_all_single", lambda *given: Done() if given[-1] else None)
    rows = torch.zeros(4, 1_000_000)
    with linked(0.064):  # 8 MB/s: half of 16 MB takes a second
        first, second = (dist.all_to_all_single(rows, rows, None, None, None, async_op=True) for _ in "12")
        clock[0] += 0.75
        first.wait()
        second.wait()
        # Without async_op the rank waits at once.
        dist.all_to_all_single(rows, rows)
    assert slept == pytest.approx([0.25, 1, 1])


def test_a_batch_that_does_not_divide(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--batch", "10", "--processes", "3"]) == 2
    assert "--batch 10 does not divide among --processes 3" in capsys.readouterr().err
    assert build_parser().parse_args([]).processes == [1, 2]
