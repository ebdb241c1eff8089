"""``recemb bench gpu`` where there is no GPU: it says so; its figures are worked out on the CPU."""

from __future__ import annotations

import pytest
import torch

from bench.gpu import main, measure
from bench.settings import TBE, Setting


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "sees no GPU" in capsys.readouterr().err


def test_every_case_is_a_row_with_its_share_of_the_roofline() -> None:
    rows = measure(Setting(rows=(5000,), dim=8, batch=64), [4], rounds=3, device="cpu")
    assert [row.case for row in rows][:2] == [TBE, "TT R=4"]
    assert len(rows) == 7
    for row in rows:
        assert row.p20_us <= row.p50_us <= row.p80_us
        assert row.floor_us is not None
        assert row.floor_us > 0
        assert (row.ratio_tbe is None) == (row.case == TBE)
