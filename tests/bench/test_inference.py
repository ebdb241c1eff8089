"""``recemb bench inference`` on small tables."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from bench.inference import build_models, main, measure, table


def test_every_type_of_weights_is_measured_against_torchrecs_int8() -> None:
    models = build_models((5000, 300, 20), ["robe", "qr"], rate=10)
    rows = {row.case: row for row in measure(models, 4, "zipf", rounds=4)}
    types = ("float32", "float16", "int8")
    methods = [f"{method} {kind}" for method in ("robe", "qr") for kind in types]
    assert list(rows) == ["uncompressed float32", "uncompressed int8", *methods]
    assert rows["uncompressed float32"].model_bytes == 5320 * 16 * 4
    assert rows["uncompressed int8"].model_bytes == 5320 * 32
    assert rows["uncompressed int8"].ratio == 1
    for method in ("robe", "qr"):
        sizes = [rows[f"{method} {kind}"].model_bytes for kind in types]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] == pytest.approx(5320 * 16 * 4 / 10, rel=0.1)
        assert rows[f"{method} int8"].bytes_ratio == 5320 * 32 / sizes[2]
    for row in rows.values():
        assert 0 < row.p50_us <= row.p90_us <= row.p99_us
    text = table(list(rows.values()))
    assert max(map(len, text.splitlines())) <= 100


def test_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    green = tmp_path / "test_green.py"
    green.write_text("def test_it():\n    assert True\n")
    sizes = ["--scale", "1/20000", "--batch", "1", "3", "--methods", "robe", "--rounds", "2"]
    assert main([*sizes, "--tests", str(green), "--output", str(tmp_path)]) == 0
    with (tmp_path / "inference.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["batch"], row["tables"]) for row in rows] == [("1", "26")] * 5 + [("3", "26")] * 5
    assert {row["cpu"] for row in rows} != {""}
    assert "uncompressed int8" in capsys.readouterr().out
