"""F29, F30: damage is found and named, an older checkpoint is taken, and nothing that is read is run."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recemb.checkpoint import latest_checkpoint, save_checkpoint, shard_file
from recemb.errors import CheckpointError
from tests.checkpoint.ranks import on_ranks, same, sharded

ROOT = Path(__file__).resolve().parents[2]
FILES = ("rank-00000.safetensors", "rank-00001.safetensors")


def _state(step: int, rank: int = 0) -> dict[str, Any]:
    full = torch.arange(40.0).reshape(10, 4) + step
    layout = [(0, (0, 0), (5, 4)), (1, (5, 0), (5, 4))]
    return {"model": {"t.weight": sharded(full, layout, rank)}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Steps 1 and 2, saved by two ranks."""
    for step in (1, 2):
        on_ranks(2, lambda rank, step=step: save_checkpoint(tmp_path, step, _state(step, rank), {"at": step}))
    return tmp_path


def _loaded(root: Path) -> int:
    found = latest_checkpoint(root)
    assert found is not None
    state = {"model": {"t.weight": torch.zeros(10, 4)}}
    found.load(state)
    assert same(state["model"]["t.weight"], torch.arange(40.0).reshape(10, 4) + found.step)
    return found.step


def _falls_back(root: Path, caplog: pytest.LogCaptureFixture, *named: str) -> None:
    """Step 1 loads, with a warning that names these; without step 1 it is an error that does."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "recemb"):
        assert _loaded(root) == 1
    warning = "\n".join(record.getMessage() for record in caplog.records)
    assert all(name in warning for name in named), warning
    shutil.rmtree(root / "step-1")
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints can be loaded") as caught:
        latest_checkpoint(root)
    assert all(name in str(caught.value) for name in named)


def test_f29_every_flipped_bit_is_found(root: Path) -> None:
    generator = random.Random(0)
    for name in (*FILES, "manifest.json"):
        path = root / "step-2" / name
        content = path.read_bytes()
        for position in sorted({0, 7, 8, len(content) - 1, *generator.sample(range(len(content)), 60)}):
            damaged = bytearray(content)
            damaged[position] ^= 1 << generator.randrange(8)
            path.write_bytes(damaged)
            step = _loaded(root)
            # The newline after the manifest says nothing.
            assert step == 1 or content[position : position + 1] == b"\n", (name, position)
        path.write_bytes(content)
    assert _loaded(root) == 2


def test_f29_a_flip_names_file_and_tensor(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = root / "step-2" / FILES[1]
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)
    _falls_back(root, caplog, FILES[1], "model/t.weight[5:10,0:4]", "not those that were written")


def test_f29_a_truncated_file_at_any_length(root: Path) -> None:
    path = root / "step-2" / FILES[0]
    content = path.read_bytes()
    for length in range(0, len(content), 9):
        path.write_bytes(content[:length])
        assert _loaded(root) == 1
    path.write_bytes(content + b"\0")
    assert _loaded(root) == 1


def _remove(folder: Path) -> None:
    (folder / FILES[1]).unlink()


def _swap(folder: Path) -> None:
    first, second = (folder / name for name in FILES)
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)


def _mix(folder: Path) -> None:
    shutil.copy(folder.parent / "step-1" / FILES[0], folder / FILES[0])


def _no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _older_manifest(folder: Path) -> None:
    shutil.copy(folder.parent / "step-1" / "manifest.json", folder / "manifest.json")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_remove, [FILES[1], "missing"]),
        (_swap, [FILES[0], "swapped"]),
        (_mix, [FILES[0], "swapped"]),
        (_no_manifest, ["manifest.json", "missing"]),
        (_older_manifest, ["step-2", "holds step 1"]),
    ],
)
def test_f29_wrong_files(
    root: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], named: list[str]
) -> None:
    damage(root / "step-2")
    _falls_back(root, caplog, *named)


def test_f29_a_stray_temporary_directory_is_named_and_not_loaded(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stray = f"step-3.tmp-{'0' * 32}"
    shutil.copytree(root / "step-2", root / stray)
    with caplog.at_level(logging.WARNING, "recemb"):
        assert _loaded(root) == 2
    assert stray in caplog.text


def test_f29_all_ranks_take_the_same_checkpoint_when_one_of_them_finds_the_damage(root: Path) -> None:
    path = root / "step-2" / FILES[1]
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")

    def load(rank: int) -> int:
        found = latest_checkpoint(root)
        assert found is not None
        state = _state(0, rank)
        found.load(state)
        return found.step

    assert on_ranks(2, load) == [1, 1]


def test_f29_damage_after_the_check_is_still_found(root: Path) -> None:
    found = latest_checkpoint(root)
    assert found is not None
    path = root / "step-2" / FILES[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(
        CheckpointError, match=r"rank-00000.safetensors: model/t.weight\[0:5,0:4\].*loaded in part"
    ):
        found.load({"model": {"t.weight": torch.zeros(10, 4)}})


def _forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the manifest with a right checksum, as an attacker would."""
    path = folder / "manifest.json"
    body = json.loads(path.read_bytes())["manifest"]
    change(body)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    path.write_text(f'{{"crc32":{zlib.crc32(text.encode())},"manifest":{text}}}\n')


def _set(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        node: Any = body
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value

    return change


SHARD = ("tensors", "model/t.weight", "shards", 0)
FORGERIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "parent": _set(*SHARD, "file", value="../step-1/rank-00000.safetensors"),
    "absolute": _set(*SHARD, "file", value="/etc/passwd"),
    "newline": _set(*SHARD, "file", value="rank-00000.safetensors\n"),
    "files parent": _set("files", value=["../../x"]),
    "more files": _set("files", value=[*FILES, "rank-00002.safetensors"]),
    "unlisted file": _set(*SHARD, "file", value="rank-00007.safetensors"),
    "overlap": _set(*SHARD, "offsets", value=[1, 0]),
    "outside": _set(*SHARD, "offsets", value=[2**40, 0]),
    "negative": _set(*SHARD, "offsets", value=[-1, 0]),
    "huge": _set("tensors", "model/t.weight", "shape", value=[2**61, 2**61]),
    "endless": _set(
        "tensors",
        "model/t.weight",
        value={
            "dtype": "F32",
            "shape": [2**61, 1],
            "shards": [{"file": FILES[0], "name": "x", "offsets": [0, 0], "sizes": [2**61, 1], "crc32": [1]}],
        },
    ),
    "beyond int64": _set("tensors", "model/t.weight", "shape", value=[2**70, 4]),
    "float": _set("tensors", "model/t.weight", "shape", value=[10.0, 4]),
    "type": _set("tensors", "model/t.weight", "dtype", value="F99"),
    "other type": _set("tensors", "model/t.weight", "dtype", value="I32"),
    "no checksums": _set(*SHARD, "crc32", value=[]),
    "wrong name": _set(*SHARD, "name", value="model/other"),
    "version": _set("format_version", value=3),
    "more": _set("run", value="import os"),
    "overlapping starts": _set(*SHARD, "sizes", value=[6, 4]),
    "gap": _set("tensors", "model/t.weight", "shards", value=[]),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_f30_forged_manifests_are_refused(root: Path, caplog: pytest.LogCaptureFixture, forgery: str) -> None:
    _forge(root / "step-2", FORGERIES[forgery])
    _falls_back(root, caplog, "step-2")


def test_f30_links_are_refused(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = root / "step-2" / FILES[0]
    path.rename(root / "elsewhere")
    path.symlink_to(root / "elsewhere")
    _falls_back(root, caplog, FILES[0])


def test_f30_a_linked_directory_and_a_pipe_are_refused(root: Path) -> None:
    (root / "step-9").symlink_to(root / "step-2")
    path = root / "step-2" / "manifest.json"
    path.unlink()
    os.mkfifo(path)
    assert _loaded(root) == 1


MANIFESTS = {
    "nested": b"[" * 200_000,
    "nested objects": b'{"manifest":' * 200_000,
    "digits": b'{"crc32":1,"manifest":{"step":' + b"9" * 1_000_000 + b"}}",
    "empty": b"",
    "binary": bytes(range(256)),
    "list": b"[1]",
    "null": b'{"crc32":0,"manifest":null}',
    "infinite": b'{"crc32":Infinity,"manifest":{}}',
}


def test_f30_a_header_of_overlapping_tensors_is_refused(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = root / "step-2" / FILES[0]
    content = path.read_bytes()
    assert content.count(b"[0,80]") == 1
    path.write_bytes(content.replace(b"[0,80]", b"[0,79]"))
    _falls_back(root, caplog, FILES[0])


@pytest.mark.parametrize("text", MANIFESTS)
def test_f30_hostile_json_is_refused(root: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    (root / "step-2" / "manifest.json").write_bytes(MANIFESTS[text])
    _falls_back(root, caplog, "manifest.json")


_BOUNDED = """
import resource, sys
from pathlib import Path
import torch
from recemb.checkpoint import latest_checkpoint
from recemb.errors import CheckpointError
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
for root in sys.argv[1:]:
    try:
        latest_checkpoint(Path(root))
        print("loaded")
    except CheckpointError as error:
        print(str(error).splitlines()[1][:120])
"""


class _Bomb:
    def __init__(self, sentinel: Path) -> None:
        self._sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._sentinel}",)


def test_f30_memory_is_bounded_and_nothing_is_run(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Under a limit of 256 MiB: headers of 2**60 bytes, a sparse manifest of 1 TB, pickles in every place."""
    base, sentinel = tmp_path_factory.mktemp("hostile"), tmp_path_factory.mktemp("sentinel") / "ran"

    def hostile(name: str) -> Path:
        folder = base / name / "step-2"
        shutil.copytree(root / "step-2", folder)
        return folder

    folder = hostile("header")
    content = (folder / FILES[0]).read_bytes()
    (folder / FILES[0]).write_bytes((2**60).to_bytes(8, "little") + content[8:])
    os.truncate(hostile("sparse manifest") / "manifest.json", 2**40)
    os.truncate(hostile("sparse file") / FILES[0], 2**40)
    _endless_row(hostile("sparse row"), 2**29)
    folder = hostile("pickle")
    for name in ("manifest.json", ".metadata", FILES[0], "state.pt"):
        (folder / name).write_bytes(pickle.dumps(_Bomb(sentinel)))
    roots = sorted(base.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", _BOUNDED, *map(str, roots)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(roots)
    assert all(str(path) in line for path, line in zip(roots, lines, strict=True)), done.stdout
    assert not sentinel.exists()


def _endless_row(folder: Path, size: int) -> None:
    """A sparse file of one tensor of one row that memory does not hold, and its manifest."""

    def change(body: dict[str, Any]) -> None:
        shard = {"file": FILES[0], "name": "x", "offsets": [0, 0], "sizes": [1, size], "crc32": [1]}
        body["tensors"] = {"x": {"dtype": "U8", "shape": [1, size], "shards": [shard]}}
        body["files"] = [FILES[0]]
        metadata = {"save_id": body["save_id"], "file": FILES[0]}
        header, starts = shard_file.layout({"x": ("U8", (1, size))}, metadata)
        (folder / FILES[0]).write_bytes(header)
        os.truncate(folder / FILES[0], starts["x"] + size)

    _forge(folder, change)
