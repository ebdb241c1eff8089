"""A rank that is killed, stopped, late or failing: the others end soon, and say which one it was."""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path

import pytest

from tests.faults.conftest import (
    RUN,
    Launcher,
    assert_same_run,
    distance,
    wait_for,
    wait_until_gone,
)

# On a quiet machine 0.1 s; the promise is 5.
SOON = 5.0
KILLED = -signal.SIGKILL
# What rank 0 finds in a save, and rank 1.
FULL_AND_BAD = ("disk_full", "bad_disk")


@pytest.mark.parametrize(
    ("place", "step", "victim"),
    [("forward", 10, 1), ("backward", 10, 1), ("save", 9, 1), ("forward", 10, 0), ("save", 3, 0)],
)
def test_f19_a_killed_rank_is_named_and_the_run_resumes_to_the_same_weights(
    launcher: Launcher, unbroken: Path, tmp_path: Path, place: str, step: int, victim: int
) -> None:
    output, mark = tmp_path / "run", tmp_path / "mark"
    fault = {"action": "kill", "place": place, "step": step, "mark": str(mark)}
    ended = launcher.train(output, hooks={victim: fault}, **RUN)
    survivor = 1 - victim
    assert ended.codes[victim] == KILLED
    assert ended.codes[survivor] == 1
    assert ended.ended[survivor] - float(mark.read_text()) < SOON
    assert f"rank {victim} died" in ended.logs[survivor]
    assert "--resume" in ended.logs[survivor]
    assert not (output / "result.json").exists()

    again = launcher.train(output, resume=True, **RUN)
    assert again.codes == [0, 0], again.logs
    # Killed in its first save, it has nothing to go on from.
    wanted = {3: r"no checkpoint", 9: r"going on from \S*step-6\b", 10: r"going on from \S*step-9\b"}[step]
    assert re.search(wanted, again.logs[0])
    assert_same_run(output, unbroken)


def test_f19_a_rank_that_torchrun_terminates_says_first_which_was_lost(
    launcher: Launcher, tmp_path: Path
) -> None:
    killed = {"action": "kill", "place": "forward", "step": 4}
    ended = launcher.train(tmp_path / "run", hooks={0: {"action": "terminated_when_lost"}, 1: killed}, **RUN)
    assert ended.codes == [1, KILLED]
    assert "rank 1 died: it was killed" in ended.logs[0]


def test_a_run_that_did_not_end_is_not_lost_by_leaving_resume_out(launcher: Launcher, tmp_path: Path) -> None:
    output = tmp_path / "run"
    fault = {"action": "kill", "place": "forward", "step": 4}
    launcher.train(output, hooks={1: fault}, **RUN)
    again = launcher.train(output, **RUN)
    assert again.codes == [2, 2]
    assert "holds the checkpoints of a run that did not end; give --resume" in again.logs[0]
    assert (output / "checkpoints" / "step-3").is_dir()
    anew = launcher.train(output, overwrite=True, **RUN | {"limit_train_batches": 2})
    assert anew.codes == [0, 0], anew.logs
    names = sorted(path.name for path in (output / "checkpoints").glob("step-*"))
    assert names == ["step-3", "step-4"]


def test_f20_a_stopped_rank_is_named_after_the_timeout(launcher: Launcher, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    fault = {"action": "stop", "place": "forward", "step": 4, "mark": str(mark)}

    def end_the_stopped(pids: list[int]) -> None:
        def later() -> None:
            wait_for(mark)
            wait_until_gone(pids[0])
            os.kill(pids[1], signal.SIGKILL)

        threading.Thread(target=later, daemon=True).start()

    ended = launcher.train(
        tmp_path / "run", hooks={1: fault}, after=end_the_stopped, dist_timeout_seconds=3, epochs=2
    )
    took = ended.ended[0] - float(mark.read_text())
    assert ended.codes == [1, KILLED]
    assert 3 <= took < 3 + SOON
    assert "rank 1 does not answer" in ended.logs[0]
    assert "train batch 4 of epoch 0" in ended.logs[0]


def test_f20_a_late_rank_is_told_from_a_stopped_one(launcher: Launcher, tmp_path: Path) -> None:
    fault = {"action": "linger", "place": "read", "step": 4}
    ended = launcher.train(tmp_path / "run", hooks={1: fault}, dist_timeout_seconds=2, epochs=2)
    assert ended.codes == [1, 1]
    for log in ended.logs:
        assert "rank 1 is reading train batch 4 of epoch 0" in log


@pytest.mark.parametrize("rank", [0, 1])
def test_f21_a_reader_that_fails_on_one_rank_ends_all_with_its_exit_code(
    launcher: Launcher, tmp_path: Path, rank: int
) -> None:
    fault = {"action": "data_error", "place": "read", "step": 4}
    ended = launcher.train(tmp_path / "run", hooks={rank: fault})
    assert ended.codes == [3, 3]
    for log in ended.logs:
        assert f"error: rank {rank}: part-00000.parquet: column label, row 7" in log


@pytest.mark.parametrize("rank", [0, 1])
def test_f21_so_does_a_defect(launcher: Launcher, tmp_path: Path, rank: int) -> None:
    fault = {"action": "defect", "place": "forward", "step": 4}
    ended = launcher.train(tmp_path / "run", hooks={rank: fault})
    assert ended.codes == [1, 1]
    assert "Traceback" in ended.logs[rank]
    assert f"rank {rank} stopped: KeyError: 'a defect of the program'" in ended.logs[1 - rank]


@pytest.mark.parametrize(
    ("place", "action", "code", "said"),
    [
        ("poll", "refused_row", 5, "table 't_cat_3': a row is NaN or infinite"),
        ("save", "data_error", 3, "part-00000.parquet: column label, row 7"),
        ("save", "bad_disk", 3, "a checkpoint cannot be written here: Input/output error"),
        ("save", "no_memory", 1, "MemoryError: no host memory"),
        ("save", "cuda_error", 1, "RuntimeError: CUDA error: out of memory"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_f28_a_save_that_fails_on_one_rank_ends_all_with_its_exit_code(
    launcher: Launcher, tmp_path: Path, place: str, action: str, code: int, said: str, rank: int
) -> None:
    fault = {"action": action, "place": place, "step": 3}
    ended = launcher.train(tmp_path / "run", hooks={rank: fault}, **RUN)
    assert ended.codes == [code, code], ended.logs
    assert re.search(rf"error: rank {rank}: .*{re.escape(said)}", ended.logs[1 - rank])
    assert re.search(rf"error: .*{re.escape(said)}", ended.logs[rank])
    # Where a defect is can be seen.
    assert ["Traceback" in log for log in ended.logs] == [code == 1 and each == rank for each in (0, 1)]


def test_f28_a_full_disk_on_one_rank_is_no_way_on_where_another_cannot_write(
    launcher: Launcher, tmp_path: Path
) -> None:
    faults = {
        rank: {"action": action, "place": "save", "step": 3} for rank, action in enumerate(FULL_AND_BAD)
    }
    ended = launcher.train(tmp_path / "run", hooks=faults, **RUN)
    assert ended.codes == [3, 3], ended.logs
    for log, name in zip(ended.logs, ("rank 1: ", ""), strict=True):
        assert re.search(rf"error: {name}/.* cannot be written here: Input/output error", log)


@pytest.mark.parametrize(
    ("action", "code", "said"),
    [("no_memory", 1, "MemoryError: no host memory"), ("data_error", 3, "part-00000.parquet: column label")],
)
def test_a_load_that_fails_on_one_rank_ends_all_with_its_exit_code(
    launcher: Launcher, tmp_path: Path, action: str, code: int, said: str
) -> None:
    output = tmp_path / "run"
    launcher.train(output, hooks={1: {"action": "kill", "place": "forward", "step": 4}}, **RUN)
    fault = {"action": action, "place": "fill"}
    ended = launcher.train(output, hooks={1: fault}, resume=True, **RUN)
    assert ended.codes == [code, code], ended.logs
    assert f"error: rank 1: {said}" in ended.logs[0]
    assert re.search(rf"error: (rank 1: )?{said}", ended.logs[1])


def test_f13_a_cached_row_that_is_not_finite_on_one_rank(launcher: Launcher, tmp_path: Path) -> None:
    """Found in the look-up, by the rank that has the table: the others wait there, and are told."""
    # Of steps 0 and 7 ids are counted, so that rows leave before this one.
    fault = {"action": "spoil_caches", "place": "forward", "step": 8}
    cache = {"compress_rate": 4, "cache_fraction": 0.05, "cache_refresh_every": 2}
    ended = launcher.train(tmp_path / "run", hooks={1: fault}, **cache)
    assert ended.codes == [5, 5]
    said = r"table 't_cat_\d+': the cached row of id \d+ is NaN or infinite and cannot be written back"
    assert re.search(rf"error: {said}", ended.logs[1])
    assert re.search(
        rf"error: rank 0, computing train batch 8 of epoch 0: rank 1 stopped: {said}", ended.logs[0]
    )


def test_f13_a_loss_that_is_not_finite_on_one_rank(launcher: Launcher, tmp_path: Path) -> None:
    output = tmp_path / "run"
    fault = {"action": "overflow", "place": "forward", "step": 7}
    ended = launcher.train(output, hooks={1: fault})
    assert ended.codes == [5, 5]
    for log in ended.logs:
        assert "error: rank 1: train batch 7 of epoch 0: the loss is inf" in log
        assert "The best weights, of step 5, are in" in log
    limited = launcher.train(tmp_path / "five", limit_train_batches=5)
    assert limited.codes == [0, 0], limited.logs
    assert distance(output, tmp_path / "five") == 0
