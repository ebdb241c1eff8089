"""The CSV, the table on the terminal, the targets and the work that figures are held against."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.floor import Floor
from bench.ids import Batch
from bench.limits import missed_lines
from bench.plot import MOST_PAGES, ratio_figure, save_plot
from bench.program import RESULTS
from bench.results import Machine, Row, columns, results_folder, table, this_machine, write_csv
from bench.settings import AT_HAND, BASE, DENSE, EMPTY, FORWARD, MD, OP, QR, TBE, TLTORCH, TT, Setting
from bench.targets import Target
from bench.work import work
from recemb.errors import ConfigError

MACHINE = Machine(
    "2030-01-02T03:04:05+00:00",
    "a CPU",
    2,
    2,
    "default",
    "default",
    0.1,
    "torch=2",
    "g++ 12",
    "1a2b3c4+",
    "abc",
)
ROW = Row("s", "10", 16, 64, 1, "zipf", "sgd", 60.0, "TT R=16", OP, 640, 5, 1000.4, 2000.0, 3000.0)


def test_a_missed_target_is_held_against_what_the_machine_can_do() -> None:
    # 10 MFLOP: 100 us as a matrix product.
    # 1.2 MB of weights at 5 GB/s and 0.4 MB of others at 40: 30 us as a copy, these.
    speeds = {"gemm_gflop_s": 100.0, "copy_gbyte_s": 40.0, "gather_gbyte_s": 5.0}
    ours = replace(ROW, p50_us=500.0, gflop_s=20.0, gbyte_s=3.2, memory_us=250.0, **speeds)
    missed = replace(ours, ratio_tbe=1.25, target="<=1", met=False)
    peer = replace(ROW, case=f"{TLTORCH}16", ratio_like=8.0, target=">=20", met=False)
    machine = "at the machine's own speed its arithmetic takes 100, its bytes 250"
    of_peer = ["missed: tltorch R=16 op [s]", f"  took 500 us, 200 are asked for: {machine}"]
    assert missed_lines([peer, ours]) == of_peer
    of_ours = ["missed: TT R=16 op [s]", f"  took 500 us, 400 are asked for: {machine}"]
    assert missed_lines([missed]) == of_ours
    # Beside it what the rows cost when they are at hand: no other case, no forward pass, no other batch.
    others = [
        replace(ROW, case=case, path=path, setting=setting, p50_us=p50)
        for case, path, setting, p50 in (
            (DENSE, OP, "s", 1.0),
            (EMPTY, OP, "s", 1.0),
            (AT_HAND, FORWARD, "s", 1.0),
            (AT_HAND, OP, "another", 1.0),
            (AT_HAND, OP, "s", 97.0),
        )
    ]
    at_hand = (
        "; a step on its rows at hand, uncompressed, took 97, with that arithmetic and these weights "
        "copied in one block 227"
    )
    assert missed_lines([peer, ours, *others]) == [of_peer[0], of_peer[1] + at_hand]
    assert missed_lines([peer, ours, *others[:-1]]) == of_peer
    # Of weights that are fetched no slower than copied, all bytes are; of unknown ones none.
    fast, unknown = replace(ours, gather_gbyte_s=40.0), replace(ours, copy_gbyte_s=None)
    for other, together in ((fast, 237), (unknown, 197)):
        assert missed_lines([peer, other, *others])[1].endswith(f" in one block {together}")
    # A billion rows' work is not counted, nor is ours where it was not run.
    assert missed_lines([replace(ROW, ratio_tbe=2.0, target="<=1", met=False)]) == of_ours[:1]
    assert missed_lines([peer]) == of_peer[:1]
    assert missed_lines([replace(missed, met=True), replace(missed, met=None)]) == []


def test_bytes_are_weights_at_random_and_streams_in_a_row() -> None:
    machine = Floor(gemm=100.0, copy=40.0, gather=4.0)
    assert machine.arithmetic(10e6) == 100.0
    assert machine.memory(4e6, 40e6) == 1000.0 + 1000.0


def test_the_csv_has_a_row_a_case_with_machine_and_versions(tmp_path: Path) -> None:
    rows = [ROW, replace(ROW, ratio_tbe=0.5, target="<=0.8", met=True), replace(ROW, met=False)]
    write_csv(tmp_path / "ops.csv", rows, MACHINE)
    with (tmp_path / "ops.csv").open() as handle:
        reader = csv.DictReader(handle)
        lines = list(reader)
    assert reader.fieldnames == columns(Row)
    assert {"case", "path", "p20_us", "p50_us", "p80_us", "ratio_tbe", "target", "met"} <= set(columns(Row))
    machine = {
        "date",
        "cpu",
        "cores",
        "threads",
        "thp_mem_alloc",
        "versions",
        "compiler",
        "commit",
        "sources",
    }
    assert machine <= set(columns(Row))
    assert [line["ratio_tbe"] for line in lines] == ["", "0.5", ""]
    assert [line["met"] for line in lines] == ["", "met", "missed"]
    assert {(line["versions"], line["compiler"], line["commit"]) for line in lines} == {
        ("torch=2", "g++ 12", "1a2b3c4+")
    }
    assert list(tmp_path.iterdir()) == [tmp_path / "ops.csv"]


def test_huge_pages_of_tensors_are_recorded_and_stand_in_the_heading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    plain = this_machine("abc")
    assert plain.thp_mem_alloc == "default"
    assert "THP" not in plain.heading()
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    huge = this_machine("abc")
    assert huge.thp_mem_alloc == "1"
    assert "THP_MEM_ALLOC_ENABLE=1" in huge.heading().splitlines()


def test_tables_fit_in_100_columns_and_leave_empty_columns_out() -> None:
    wide = replace(
        ROW, case="nn.EmbeddingBag", path="forward", p20_us=1e7, p50_us=1e7, p80_us=1e7, ratio_tbe=184.2,
        like="x", ratio_like=1.25, target=">=20", met=False, gflop_s=204.1, gbyte_s=33.3, floor_us=9e6,
    )  # fmt: skip
    lines = table([wide, ROW]).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].split()[-1] == "floor"
    assert " missed " in lines[1]
    assert "90%" in lines[1]
    assert table([ROW]).splitlines()[0].split() == ["case", "path", "P20", "us", "P50", "us", "P80", "us"]


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--output .*file/below: Not a directory; give a folder"):
        results_folder(tmp_path / "file" / "below", None)
    assert results_folder(None, tmp_path / "file" / "below") is None
    assert results_folder(None, tmp_path / "new") == tmp_path / "new"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("ops_*.csv")), ids=lambda path: path.stem)
def test_kept_figures_have_columns_of_today(path: Path) -> None:
    with path.open() as handle:
        names = csv.DictReader(handle).fieldnames
    assert set(names or ()) <= set(columns(Row)), "a renamed column leaves older figures behind"


@pytest.mark.parametrize(
    ("target", "tbe", "like", "met"),
    [
        (Target(0.8), 0.8, None, True),
        (Target(0.8), 0.81, None, False),
        (Target(0.8), None, 0.1, None),
        (Target(20, like=True, at_least=True), 0.1, 20.0, True),
        (Target(20, like=True, at_least=True), 99.0, 19.9, False),
    ],
)
def test_a_target_judges_its_own_ratio(
    target: Target, tbe: float | None, like: float | None, met: bool | None
) -> None:
    assert target.met(tbe, like) is met


def _batch(setting: Setting, ids: list[int]) -> Batch:
    bags = torch.arange(setting.batch + 1) * setting.hots
    places = torch.tensor(ids).unique(return_inverse=True)[1]
    return Batch(torch.tensor(ids), bags, bags.diff(), torch.ones(setting.batch, setting.dim), places)


def test_work_by_hand() -> None:
    setting = replace(BASE, rows=(24,), dim=8, batch=3, hots=1)
    batches = [_batch(setting, [0, 1, 1])]
    # Forward: 2 rows of 8 float32 read, 3 x 8 written, 3 ids of 8 bytes; 3 additions of 8.
    assert work(DENSE, FORWARD, setting, batches) == work(TBE, FORWARD, setting, batches)
    assert work(TBE, FORWARD, setting, batches).nbytes == 4 * (16 + 24) + 24
    assert work(TBE, FORWARD, setting, batches).flop == 24
    # A step: weights read, read and written; outputs written, gradients read.
    assert work(TBE, OP, setting, batches).nbytes == 4 * (3 * 16 + 2 * 24) + 24
    assert work(TBE, OP, setting, batches).flop == 72
    # Quotient rows {0}, remainder rows {0, 1}; 2 products of 8.
    assert work(QR, FORWARD, setting, batches).nbytes == 4 * (3 * 8 + 24) + 24
    assert work(QR, FORWARD, setting, batches).flop == 24 + 16
    # 2 rows of 4 and the 4 x 8 projection; 2 x 4 x 8 for each row.
    assert work(MD, FORWARD, setting, batches).nbytes == 4 * (8 + 32 + 24) + 24
    assert work(MD, FORWARD, setting, batches).flop == 24 + 2 * 64


def test_tensor_train_work_shares_prefixes() -> None:
    setting = replace(BASE, rows=(1000,), dim=8, batch=2)
    neighbours, strangers = ([_batch(setting, ids)] for ids in ([0, 1], [0, 998]))
    # q = (2, 1, 4), R = 4: (2 x 4)(4 x 4) once a prefix, then (2 x 4)(4 x 4) a row; 16 additions.
    assert work(f"{TT}4", FORWARD, setting, neighbours).flop == 64 * 1 + 64 * 2 + 16
    assert work(f"{TT}4", FORWARD, setting, strangers).flop == 64 * 2 + 64 * 2 + 16
    # Slices of 8, 16 and 16 weights.
    assert work(f"{TT}4", FORWARD, setting, neighbours).nbytes == 4 * (8 + 16 + 2 * 16 + 16) + 16
    assert work(f"{TT}4", FORWARD, setting, strangers).nbytes == 4 * (2 * 8 + 2 * 16 + 2 * 16 + 16) + 16


def test_the_plot_marks_bounds_on_the_drawn_ratio_only() -> None:
    rows = [
        replace(ROW, case=TBE, ratio_tbe=1.0),
        replace(ROW, ratio_tbe=0.4, target="<=0.8"),
        replace(ROW, case="tltorch R=16", ratio_tbe=12.0, target=">=20"),
    ]
    (axes,) = (axes for axes in ratio_figure(rows).axes if axes.axison)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["TT R=16 · op", "tltorch R=16 · op"]
    bounds = [line.get_xdata()[0] for line in axes.lines]  # type: ignore[index]
    assert sorted(bounds) == [0.8, 1]
    assert {text.get_text() for text in axes.texts} == {"0.4", "12"}


def test_settings_that_one_page_does_not_hold_go_on_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.plot._MOST_BARS", 5)
    rows = [
        replace(ROW, setting=setting, case=f"TT R={rank}", ratio_tbe=0.5)
        for setting in ("a", "b", "c")
        for rank in (16, 32)
    ]
    names = [path.name for path in save_plot(rows, tmp_path, "ops")]
    assert names == ["ops.png", "ops.svg", "ops_2.png", "ops_2.svg"]
    # Nothing of the last run stays beside what this one wrote.
    assert save_plot(rows[:4], tmp_path, "ops") == [tmp_path / "ops.png", tmp_path / "ops.svg"]
    assert len(list(tmp_path.iterdir())) == 2
    many = [replace(row, setting=str(k)) for k in range(3 * MOST_PAGES) for row in rows[:2]]
    assert save_plot(many, tmp_path, "ops") == []
    assert not list(tmp_path.iterdir())
