"""``recemb bench micro_batches`` on small tables."""

from __future__ import annotations

import pytest
import torch

from bench.ids import make_batches
from bench.micro_batches import Steps, main, measure, table
from bench.settings import Setting


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cuda"]) == 2
    assert "sees no GPU here; leave out --device cuda" in capsys.readouterr().err


def test_smaller_micro_batches_take_less_workspace() -> None:
    rows = measure(Setting(rows=(5000, 100), batch=2048, ids="uniform"), 8, [1024, 256], rounds=3)
    assert [(row.micro_batch_rows, row.prefetch) for row in rows] == [
        (2**30, False),
        (1024, False),
        (256, False),
        (256, True),
    ]
    whole, *others = (row.workspace_bytes for row in rows)
    assert 0 < others[1] < others[0] < whole
    assert rows[0].ratio == 1
    text = table(rows)
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("yes") == 1


def test_slices_of_an_eighth_of_the_rows_take_a_quarter_of_the_workspace() -> None:
    setting = Setting(rows=(50_000, 100), batch=8192, ids="uniform")
    batches = make_batches(setting)
    # Some 7,700 distinct rows of the first table.
    taken = []
    for micro_batch_rows in (2**30, 1024):
        steps = Steps(setting, 32, micro_batch_rows, ahead=False)
        steps.step(batches, batches[0])
        taken.append(steps.workspace_bytes())
    whole, slices = taken
    assert 0 < 4 * slices <= whole
