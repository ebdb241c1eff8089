"""``recemb bench gpu`` where there is no GPU: it says so; its figures are worked out on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import gpu
from bench.gpu import main, measure
from bench.ids import make_batches
from bench.results import table
from bench.settings import OP, TBE, Setting
from bench.work import work


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("tables", [1, 3])
def test_every_case_is_a_row_with_its_share_of_the_roofline(tables: int) -> None:
    rows = measure(Setting(rows=(5000,) * tables, dim=8, batch=64), [4], rounds=3, device="cpu")
    assert [row.case for row in rows][:2] == [TBE, "TT R=4"]
    assert len(rows) == 7
    for row in rows:
        assert row.p20_us <= row.p50_us <= row.p80_us
        assert row.floor_us is not None
        assert row.floor_us > 0
        assert (row.ratio_tbe is None) == (row.case == TBE)


@pytest.mark.parametrize(("bandwidth", "rate"), [(3e9, 1e15), (1e15, 2e9)], ids=["bytes", "arithmetic"])
def test_the_floor_is_the_slower_of_bytes_and_arithmetic(
    bandwidth: float, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_copy_rate", lambda _: bandwidth)
    monkeypatch.setattr(gpu, "_gemm_rate", lambda _: rate)
    setting = Setting(rows=(5000,), dim=8, batch=64)
    batches = make_batches(setting)
    for row in measure(setting, [4], rounds=1, device="cpu", ahead=1):
        todo = work(row.case, OP, setting, batches)
        seconds = todo.nbytes / bandwidth if bandwidth < rate else todo.flop / rate
        assert row.floor_us == pytest.approx(1e6 * seconds)
        assert (row.copy_gbyte_s, row.gemm_gflop_s) == (bandwidth / 1e9, rate / 1e9)
        assert row.floor_us
        # Whatever it took here.
        assert " 37%" in table([replace(row, p50_us=row.floor_us / 0.37)])
