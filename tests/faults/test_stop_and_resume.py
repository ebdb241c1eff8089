"""Signals to one rank stop all of them; what is resumed equals what was never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import RUN as CHECKPOINTED
from tests.faults.conftest import Launcher, assert_same_run, distance, result

RUN = CHECKPOINTED | {"checkpoint_freq": 0}
TERMINATE = {"action": "terminate", "place": "forward"}


@pytest.mark.parametrize(
    ("method", "rate", "more", "stops"),
    [
        ("tt", 5, {"optimizer": "adam"}, [3, 9]),
        ("robe", 20, {"optimizer": "rowwise_adagrad"}, [9]),
        ("dense", None, {"optimizer": "adagrad"}, [3]),
        ("tt", 4, {"cache_fraction": 0.05, "cache_refresh_every": 2}, [3, 9]),
    ],
)
def test_f31_a_signal_to_one_rank_stops_all_of_them_and_resumes_bit_for_bit(
    launcher: Launcher, tmp_path: Path, method: str, rate: int | None, more: dict[str, Any], stops: list[int]
) -> None:
    flags: dict[str, Any] = RUN | {"method": method, "compress_rate": rate} | more
    output, unbroken = tmp_path / "run", tmp_path / "unbroken"
    for step in stops:
        ended = launcher.train(output, hooks={1: TERMINATE | {"step": step}}, resume=True, **flags)
        assert ended.codes == [75, 75], ended.logs
        for log in ended.logs:
            assert f"SIGTERM came after step {step + 1}" in log
            assert f"--resume to go on from step {step + 1}" in log
        assert result(output)["status"] == "interrupted"
    again = launcher.train(output, resume=True, **flags)
    assert again.codes == [0, 0], again.logs
    assert launcher.train(unbroken, **flags).codes == [0, 0]
    assert_same_run(output, unbroken)
    assert result(output)["caches"] == result(unbroken)["caches"]
    assert ("cache_fraction" in more) == (len(result(output)["caches"]) > 0)


def test_a_complete_run_is_not_resumed(launcher: Launcher, unbroken: Path) -> None:
    before = (unbroken / "result.json").read_bytes()
    complete = launcher.train(unbroken, resume=True, **CHECKPOINTED)
    assert complete.codes == [0, 0]
    assert "is complete; --resume leaves it as it is" in complete.logs[0]
    assert (unbroken / "result.json").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "tolerance"),
    [
        ({}, 1e-6),
        ({"compress_rate": 4, "cache_fraction": 0.05, "cache_refresh_every": 2}, 1e-5),
        ({"optimizer": "adagrad"}, 1e-5),
        ({"optimizer": "rowwise_adagrad"}, 2e-6),
    ],
)
def test_f32_another_number_of_ranks(
    launcher: Launcher, tmp_path: Path, more: dict[str, Any], tolerance: float
) -> None:
    """Two ranks, then one, then three: each step's rows stay the same, sums are taken in another order."""
    output, unbroken, flags = tmp_path / "run", tmp_path / "unbroken", RUN | more
    two = launcher.train(output, 2, hooks={0: TERMINATE | {"step": 3}}, **flags | {"batch_size": 120})
    assert two.codes == [75, 75], two.logs
    one = launcher.train(
        output, 1, hooks={0: TERMINATE | {"step": 9}}, resume=True, **flags | {"batch_size": 240}
    )
    assert one.codes == [75], one.logs
    three = launcher.train(output, 3, resume=True, **flags | {"batch_size": 80})
    assert three.codes == [0, 0, 0], three.logs
    assert launcher.train(unbroken, 1, **flags | {"batch_size": 240}).codes == [0]
    assert 0 < distance(output, unbroken) < tolerance
    assert abs(result(output)["auc"] - result(unbroken)["auc"]) < 1e-4
    for name, figures in result(unbroken)["caches"].items():
        assert result(output)["caches"][name] == pytest.approx(figures, abs=1e-4)


def test_f32_other_settings_are_listed(launcher: Launcher, tmp_path: Path) -> None:
    output = tmp_path / "run"
    ended = launcher.train(output, hooks={0: TERMINATE | {"step": 3}}, **RUN)
    assert ended.codes == [75, 75]
    other = launcher.train(output, resume=True, **RUN | {"seed": 4, "compress_rate": 7, "batch_size": 101})
    assert other.codes == [2, 2]
    for log in other.logs:
        assert "step-4 is of a run with other settings" in log
        assert "seed: 0 in the checkpoint, 4 now" in log
        assert "compress_rate: 5.0 in the checkpoint, 7.0 now" in log
        assert "batch_size x ranks: 200 in the checkpoint, 202 now" in log
    assert (output / "checkpoints" / "step-4").is_dir()
