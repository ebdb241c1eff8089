"""``recemb bench micro_batches`` on small tables."""

from __future__ import annotations

from bench.micro_batches import measure, table


def test_smaller_micro_batches_take_less_workspace() -> None:
    rows = measure((5000, 100), 2048, "uniform", 8, [1024, 256], rounds=3)
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
