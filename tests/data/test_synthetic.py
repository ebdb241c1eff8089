"""The synthetic log: exact Zipf, a teacher whose probability is right, a best AUC that is the best."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.data import synthetic, teacher
from recemb.data.click_log import ClickLog
from recemb.data.synthetic import KAGGLE_CARDINALITIES, scaled_cardinalities, write_synthetic
from recemb.data.teacher import BestScore, Teacher
from recemb.data.zipf import BoundedZipf
from recemb.errors import ConfigError


def exact_auc(score: np.ndarray[Any, Any], clicked: np.ndarray[Any, Any]) -> float:
    """P(score of a click > score of a non-click), ties one half, over all pairs."""
    difference = score[clicked][:, None] - score[~clicked][None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 10, 1000])
@pytest.mark.parametrize("exponent", [1.05, 0.5, 2.0])
def test_zipf_draws_follow_the_exact_distribution(ranks: int, exponent: float) -> None:
    n = 200_000
    drawn = BoundedZipf(ranks, exponent).sample(np.random.Generator(np.random.Philox(7)), n)
    weights = np.arange(1, ranks + 1) ** -exponent
    expected = n * weights / weights.sum()
    counts = np.bincount(drawn, minlength=ranks + 1)[1:]
    assert counts.size == ranks, "a rank above N was drawn"
    assert drawn.min() >= 1
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < ranks - 1 + 4 * math.sqrt(2 * ranks) + 1e-9


def test_zipf_of_a_full_size_table_needs_no_table() -> None:
    drawn = BoundedZipf(2**40, 1.05).sample(np.random.Generator(np.random.Philox(1)), 100_000)
    harmonic = float((np.arange(1, 10**6 + 1) ** -1.05).sum())
    tail = ((10**6 + 0.5) ** -0.05 - (2**40 + 0.5) ** -0.05) / 0.05
    assert (drawn == 1).mean() == pytest.approx(1 / (harmonic + tail), rel=0.05)
    assert drawn.max() > 2**33


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.fractions(min_value=Fraction(1, 10**6), max_value=1))
def test_cardinalities_follow_the_stated_rule(scale: Fraction) -> None:
    for size, scaled in zip(KAGGLE_CARDINALITIES, scaled_cardinalities(scale), strict=True):
        assert scaled == max(min(size, 4), round(size * scale))
        assert 3 <= scaled <= size


def test_full_scale_is_criteo_kaggle() -> None:
    assert scaled_cardinalities(Fraction(1)) == list(KAGGLE_CARDINALITIES)
    assert (len(KAGGLE_CARDINALITIES), sum(KAGGLE_CARDINALITIES)) == (26, 33_762_577)


def test_splitmix64_reference_values() -> None:
    """The first outputs of S. Vigna's splitmix64.c for seed 1234567."""
    golden = 0x9E3779B97F4A7C15
    state = [(1234567 + step * golden) % 2**64 for step in (1, 2, 3)]
    assert [teacher._splitmix64_scalar(value) for value in state] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_vector_hash_equals_the_scalar_one(key: int) -> None:
    ids = np.array([0, 1, 2**24 + 1, 2**31, 2**40, 2**63 - 1])
    words = teacher._hash_ids(key, ids)
    for identifier, row in zip(ids.tolist(), words.tolist(), strict=True):
        value = teacher._splitmix64_scalar((key + identifier * teacher._GOLDEN) % 2**64)
        parts = [(value >> (16 * place)) & 0xFFFF for place in range(4)]
        assert row == [(part - 2**16 if part >= 2**15 else part) / 2**15 for part in parts]


def test_teacher_equals_its_formula() -> None:
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 50, 20) for _ in range(3)]
    dense = rng.standard_normal((13, 20)).astype(np.float32)
    model = Teacher(5, 3)
    model.fit(ids, dense, 0.3)
    probability, dense_score = model.probability(ids, dense)
    for row in range(20):
        words = [teacher._hash_ids(model._keys[k], ids[k][row : row + 1])[0] for k in range(3)]
        main = sum(float(model._feature_weights[k]) * words[k][0] for k in range(3))
        pairs = sum(float(words[k][1:] @ words[l][1:]) for k in range(3) for l in range(k + 1, 3))
        linear = float(model._dense_weights @ dense[:, row])
        s_main, s_pairs, s_dense = model._scales
        logit = model._bias + s_main * main + s_pairs * pairs + s_dense * linear
        assert probability[row] == pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-4)
        assert dense_score[row] == pytest.approx(1 / (1 + math.exp(-s_dense * linear)), rel=1e-6)
    assert probability.mean() == pytest.approx(0.3, abs=1e-6)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 99), st.booleans()), min_size=1, max_size=50))
def test_best_score_equals_all_pairs(rows: list[tuple[int, bool]]) -> None:
    score = np.array([value / 100 for value, _ in rows])
    clicked = np.array([hit for _, hit in rows])
    best = BestScore()
    best.add(score[:10], clicked[:10])
    best.add(score[10:], clicked[10:])
    assert best.logloss() == pytest.approx(-np.log(np.where(clicked, score, 1 - score)).mean())
    if clicked.all() or not clicked.any():
        assert best.auc() is None
    else:
        assert best.auc() == pytest.approx(exact_auc(score, clicked), abs=1e-9)


def test_log_is_a_prepared_directory_with_a_known_best(tmp_path: Path, criteo: SimpleNamespace) -> None:
    stats = write_synthetic(tmp_path / "s", 60_000, "1/1000", 3, val_fraction="1/6", test_fraction="1/60")
    log = ClickLog.open(tmp_path / "s")
    assert log.stats == stats
    assert log.num_embeddings_per_feature == scaled_cardinalities(Fraction(1, 1000))
    assert stats["rows"] == {"train": 49_000, "val": 10_000, "test": 1000}
    assert stats["clicks"]["train"] / 49_000 == pytest.approx(0.25, abs=0.01)
    assert 0.80 <= stats["best_auc"] <= 0.85
    assert 0.55 <= stats["best_auc_without_embeddings"] <= 0.68
    assert stats["best_logloss"] < 0.50
    train = criteo.epoch(log, "train", 1000)
    assert np.isfinite(train[:, 1:14].astype(np.int32).view(np.float32)).all()
    for index, feature in enumerate(stats["features"]):
        counts = np.bincount(train[:, 14 + index], minlength=feature["num_embeddings"])
        assert feature["distinct"] == np.count_nonzero(counts)
        assert feature["top_share"]["1"] == pytest.approx(counts.max() / 49_000)
        # id order is that of falling frequency, up to the noise of neighbours
        assert counts[0] == counts.max()
    missing = [(train[:, column] == 0).sum() for column in range(1, 14)]
    assert [entry["missing"] for entry in stats["dense"]] == missing


def test_best_auc_is_that_of_the_true_probability(tmp_path: Path, criteo: SimpleNamespace) -> None:
    stats = write_synthetic(tmp_path / "s", 20_000, 0.01, 1, val_fraction="0.2")
    sizes = scaled_cardinalities(Fraction(1, 100))
    rows, probability, dense_score = synthetic._Generator(sizes, 1).rows(1 << 48, 4000)
    val = criteo.epoch(ClickLog.open(tmp_path / "s"), "val", 5000)
    assert (val[:, 14:] == rows.ids.T).all()
    clicked = val[:, 0].astype(bool)
    assert stats["best_auc"] == pytest.approx(exact_auc(probability, clicked), abs=1e-6)
    assert stats["best_auc_without_embeddings"] == pytest.approx(exact_auc(dense_score, clicked), abs=1e-6)
    expected = -np.log(np.where(clicked, probability, 1 - probability)).mean()
    assert stats["best_logloss"] == pytest.approx(float(expected))
    # calibrated: each tenth of the predictions has the clicks it predicts, within four standard deviations
    for tenth in np.array_split(np.argsort(probability), 10):
        p = probability[tenth]
        assert abs(clicked[tenth].sum() - p.sum()) < 4 * math.sqrt(float((p * (1 - p)).sum()))


def test_same_arguments_same_bytes_other_seed_other_rows(tmp_path: Path, criteo: SimpleNamespace) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_synthetic(tmp_path / name, 3000, "1/1000", seed)
    a, b, c = (criteo.tree(tmp_path / name) for name in "abc")
    assert a == b
    assert a["train/part-00000.parquet"] != c["train/part-00000.parquet"]


def test_first_rows_are_the_same_on_every_machine(tmp_path: Path, criteo: SimpleNamespace) -> None:
    """Golden values: a change of the generator would silently change every published synthetic figure."""
    write_synthetic(tmp_path / "s", 1000, "1/1000", 0)
    rows = criteo.epoch(ClickLog.open(tmp_path / "s"), "train", 900)
    assert rows[:3, [0, 16, 17, 25, 39]].tolist() == [
        [0, 1564, 0, 28, 47],
        [0, 3761, 2028, 0, 4],
        [0, 17, 33, 3220, 2],
    ]


def test_row_groups_do_not_depend_on_how_many_rows_follow(tmp_path: Path, criteo: SimpleNamespace) -> None:
    for name, rows in (("short", 70_000), ("long", 140_000)):
        write_synthetic(tmp_path / name, rows, "1/1000", 0, val_fraction="0")
    short, long = (criteo.epoch(ClickLog.open(tmp_path / name), "train", 10**6) for name in ("short", "long"))
    assert (long[:65_536] == short[:65_536]).all()
    assert len({row.tobytes() for row in long}) > 139_000, "streams must not repeat"


def test_finished_log_is_left_and_other_arguments_are_named(tmp_path: Path) -> None:
    first = write_synthetic(tmp_path / "s", 2000, "1/1000", 0)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")}
    assert write_synthetic(tmp_path / "s", 2000, 0.001, 0) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")} == before
    with pytest.raises(ConfigError, match="--seed: 0 -> 4"):
        write_synthetic(tmp_path / "s", 2000, "1/1000", 4)


def test_an_interrupted_log_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "finish", lambda *args: None)
        write_synthetic(tmp_path / "s", 2000, "1/1000", 0)
    assert not (tmp_path / "s" / "stats.json").exists()
    stats = write_synthetic(tmp_path / "s", 2000, "1/1000", 0)
    assert json.loads((tmp_path / "s" / "stats.json").read_text()) == stats


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_rows": 0}, "--rows 0"),
        ({"scale": 0}, "--scale 0"),
        ({"scale": "1.5"}, "--scale 1.5"),
        ({"scale": "big"}, "--scale"),
        ({"scale": "nan"}, "--scale"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 2**63}, "--seed"),
        ({"val_fraction": "1"}, "--val_fraction"),
        ({"val_fraction": "0.001"}, "--val_fraction"),
    ],
)
def test_bad_arguments_name_the_flag(tmp_path: Path, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        write_synthetic(tmp_path / "s", **{"num_rows": 100, **arguments})
    assert named in str(caught.value)
    assert not (tmp_path / "s").exists()
