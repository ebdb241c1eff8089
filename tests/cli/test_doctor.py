"""``recemb doctor``: what it finds, and when it says that training would fail."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from recemb.training import diagnosis
from recemb.training.diagnosis import examine
from recemb_kernels import build
from recemb_kernels.native import status

Recemb = Callable[..., Any]


def finding(name: str) -> diagnosis.Finding:
    return next(each for each in examine() if each.name == name)


def test_this_installation_can_train(recemb: Recemb) -> None:
    code, out, err = recemb("doctor")
    assert (code, err) == (0, "")
    assert "a training run would work" in out
    for word in (
        torch.__version__,
        "matched trio",
        "kernels",
        "plain torch",
        "C++ compiler",
        "threads",
        "cache",
    ):
        assert word in out


def test_json_form(recemb: Recemb) -> None:
    code, out, _ = recemb("doctor", "--format", "json")
    assert code == 0
    entries = {entry["name"]: entry for entry in json.loads(out)}
    assert entries["torch"]["value"] == torch.__version__
    assert entries["fbgemm"]["value"] == "1.8.0"
    assert {entry["status"] for entry in entries.values()} <= {"ok", "note", "missing"}
    assert set(status()) == {name.removeprefix("kernel ") for name in entries if name.startswith("kernel ")}


def test_f36_a_wrong_trio_exits_2_with_the_repair(recemb: Recemb, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"recemb": "0", "python": "3.11", "torch": "2.12.0", "torchrec": "1.8.0"}
    monkeypatch.setattr(diagnosis, "versions", lambda: found)
    code, out, _ = recemb("doctor")
    assert code == 2
    assert re.search(r"^fbgemm +missing +not installed$", out, re.MULTILINE)
    assert "torch 2.12.0 is installed, 2.13.* is needed; fbgemm is not installed" in out
    assert "pip install --no-deps torch==2.13.0" in out
    assert "a training run would fail: fbgemm, matched trio" in out


def test_f36_a_broken_library_is_found_by_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        if name == "fbgemm_gpu":
            raise OSError("libtorch_cuda.so: cannot open shared object file\nmore")
        return import_module(name)

    monkeypatch.setattr(diagnosis, "import_module", broken)
    found = finding("imports")
    assert found.status == "missing"
    assert found.value == "import fbgemm_gpu fails: libtorch_cuda.so: cannot open shared object file"


def test_no_compiler_is_a_note_and_kernels_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert finding("C++ compiler").status == "note"
    kernels = [each for each in examine() if each.name.startswith("kernel ")]
    assert kernels
    assert all(each.status == "note" and each.value.startswith("plain torch") for each in kernels)


def test_a_compiler_that_fails_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    found = finding("C++ compiler")
    assert found.status == "note"
    assert "/bin/false fails" in found.value


def test_a_compiler_without_room_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "_compile", full)
    assert "No space left on device" in finding("C++ compiler").value


def test_a_compiler_that_compiles_nothing_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "g++"
    path.write_text(
        '#!/bin/sh\ncase "$*" in *-shared*) echo cc1plus is not there >&2; exit 1;; esac\necho 12\n'
    )
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    found = finding("C++ compiler")
    assert (found.status, found.value) == (
        "note",
        f"the C++ compiler {path} fails with exit status 1: cc1plus is not there; all runs on plain torch",
    )
    kernels = [each for each in examine() if each.name.startswith("kernel ")]
    assert all("cc1plus is not there" in each.value for each in kernels)


def test_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def cache() -> diagnosis.Finding:
        # The folder is looked for once a process.
        build.cache_dir.cache_clear()
        return finding("cache")

    (tmp_path / "file").write_text("")
    monkeypatch.delenv("RECEMB_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    try:
        found = cache()
        assert (found.status, found.repair) == ("note", "set RECEMB_CACHE_DIR to a writable folder")
        monkeypatch.setenv("RECEMB_CACHE_DIR", str(tmp_path / "cache"))
        found = cache()
        assert found.status == "ok"
        assert str(tmp_path / "cache") in found.value
        monkeypatch.setenv("RECEMB_CACHE_DIR", str(tmp_path / "file"))
        found = cache()
        assert (found.status, found.repair) == ("note", "set RECEMB_CACHE_DIR to a writable folder")
        assert str(tmp_path / "file") in found.value
    finally:
        build.cache_dir.cache_clear()


def test_more_threads_than_cores_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    assert finding("threads").status == "note"
