"""What a state may hold, how it comes back, and what is said when it does not fit."""

from __future__ import annotations

import copy
import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from recemb.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint, shard_file
from recemb.checkpoint.boxes import Box, untiled
from recemb.checkpoint.manifest import Manifest, StoredShard, StoredTensor
from recemb.checkpoint.tree import DTYPES
from recemb.errors import CheckpointError, DiskFullError, RecembError
from tests.checkpoint.ranks import bits, on_ranks, same, sharded


def _saved(root: Path, state: Any, **extra: Any) -> Checkpoint:
    save_checkpoint(root, 1, state, extra)
    found = latest_checkpoint(root)
    assert found is not None
    return found


def _scrambled(node: Any) -> Any:
    """The same structure with other contents, in memory of its own."""
    if isinstance(node, Tensor):
        return torch.empty_strided(node.shape, node.stride(), dtype=node.dtype).copy_(torch.ones_like(node))
    if isinstance(node, dict):
        return type(node)((key, _scrambled(item)) for key, item in node.items())
    if isinstance(node, list):
        return [_scrambled(item) for item in node]
    return node


@pytest.mark.parametrize("name", DTYPES)
def test_every_type_and_shape_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES[name]
    top = 2 if dtype is torch.bool else 256
    base = torch.randint(0, top, (6 * 5 * 8 * 8,), generator=generator, dtype=torch.uint8).view(dtype)
    state = {
        "matrix": base[:30].view(6, 5),
        "transposed": base[:30].view(6, 5).t(),
        "columns": base[:30].view(6, 5)[:, 1:3],
        "steps": base[:12:3],
        "vector": base[:7],
        "scalar": base[3],
        "no rows": base[:0].view(0, 5),
        "no columns": base[:0].view(5, 0),
        "cube": base[:60].view(3, 4, 5),
        "one row": base[:40].view(1, 40),
    }
    found = _saved(tmp_path, state)
    loaded = {key: torch.ones_like(value) for key, value in state.items()}
    found.load(loaded)
    assert same(loaded, state)
    # Anyone else reads the same with the library.
    file = load_file(tmp_path / "step-1" / "rank-00000.safetensors")
    assert all(bits(file[key]) == bits(state[key]) for key in state if state[key].numel())


def test_blocks_of_every_size_hold_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"w": torch.randn(13, 7), "b": torch.randn(13).bfloat16(), "n": torch.arange(5)}
    contents = set()
    for at, size in enumerate((1, 8, 28, 60, 2**24)):
        monkeypatch.setattr(shard_file, "BLOCK_BYTES", size)
        loaded = _scrambled(state)
        _saved(tmp_path / str(at), state).load(loaded)
        assert same(loaded, state)
        content = (tmp_path / str(at) / "step-1" / "rank-00000.safetensors").read_bytes()
        contents.add(content[-(13 * 7 * 4 + 13 * 2 + 5 * 8) :])
    assert len(contents) == 1


def test_host_memory_holds_one_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_file, "BLOCK_BYTES", 100)
    sizes: list[int] = []
    inner: Callable[[Tensor], memoryview] = shard_file._bytes_of

    def record(rows: Tensor) -> memoryview:
        sizes.append(rows.numel() * rows.itemsize)
        return inner(rows)

    monkeypatch.setattr(shard_file, "_bytes_of", record)
    save_checkpoint(tmp_path, 1, {"w": torch.randn(50, 5), "v": torch.randn(333)}, {})
    assert max(sizes) == 100
    assert sum(sizes) == (50 * 5 + 333) * 4


def test_memory_of_several_keys_is_written_and_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = torch.randn(1000)
    state = {"embedding_bags.a.weight": array, "embedding_bags.b.weight": array, "half": array[:500]}
    found = _saved(tmp_path, {"model": state})
    assert (tmp_path / "step-1" / "rank-00000.safetensors").stat().st_size < 4000 + 2000 + 1000
    reads: list[str] = []
    inner = shard_file.ShardFile.read

    def record(self: Any, name: str, *rest: Any) -> Tensor:
        reads.append(name)
        return inner(self, name, *rest)

    monkeypatch.setattr(shard_file.ShardFile, "read", record)
    tied = torch.zeros(1000)
    own = torch.zeros(500)
    found.load({"model": {"embedding_bags.a.weight": tied, "embedding_bags.b.weight": tied, "half": own}})
    assert torch.equal(tied, array)
    assert torch.equal(own, array[:500])
    assert reads == ["model/embedding_bags.a.weight", "model/half"]
    # Into memory of their own each gets it.
    apart = {key: torch.zeros_like(value) for key, value in state.items()}
    found.load({"model": apart})
    assert same(apart, state)


def test_values_come_back_where_they_were(tmp_path: Path) -> None:
    state = {
        "optimizer": {
            "state": {
                0: {"step": torch.tensor(4.0), "sum": torch.randn(3, 2)},
                1: {"step": torch.tensor(2.0)},
            },
            "param_groups": [
                {"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1], "maximize": False, "foreach": None},
                {"lr": 1e-30, "betas": (0.5, 0.25), "params": [], "schedule": [(1, 2), [3, (4,)]]},
            ],
        },
        "best": -math.inf,
        "name": "tt ü\u2028/~",
        "big": 2**80,
        "mixed": [1, torch.arange(3), {"a/b": 2, "a~1b": 3}],
        "ordered": OrderedDict(b=1, a=2),
    }
    kept = copy.deepcopy(state)
    found = _saved(tmp_path, state)
    other = _scrambled(copy.deepcopy(state))
    groups = other["optimizer"]["param_groups"]
    groups[0].update(lr=5.0, betas=(0.0, 0.0), params=[7], maximize=True, foreach=True)
    groups[1].update(lr=5.0, params=[1, 2, 3])
    other.update(best=0.0, name="", big=0)
    other["mixed"][0], other["mixed"][2]["a/b"], other["ordered"]["a"] = 0, 0, 0
    found.load(other)
    assert same(other, kept)
    assert same(state, kept)


def test_loading_is_in_place(tmp_path: Path) -> None:
    saved, other = nn.Linear(3, 2), nn.Linear(3, 2)
    found = _saved(tmp_path, {"model": saved.state_dict()})
    pointers = [parameter.data_ptr() for parameter in other.parameters()]
    found.load({"model": other.state_dict()})
    assert torch.equal(saved.weight, other.weight)
    assert torch.equal(saved.bias, other.bias)
    assert [parameter.data_ptr() for parameter in other.parameters()] == pointers
    # Parameters that take a gradient, and columns of a larger tensor, are written to as they are.
    found.load({"model": dict(nn.Linear(3, 2).named_parameters())})
    wide = torch.zeros(2, 9)
    found.load({"model": {"weight": wide[:, 2:8:2], "bias": torch.zeros(2)}})
    assert torch.equal(wide[:, 2:8:2], saved.weight)
    assert float(wide[:, [0, 1, 3, 5, 7, 8]].abs().sum()) == 0


def test_f32_everything_that_does_not_fit_is_said_before_anything_is_written(tmp_path: Path) -> None:
    state = {
        "model": {
            "embedding_bags.t.core_0": torch.ones(4, 8),
            "embedding_bags.t.core_1": torch.ones(4, 64),
            "embedding_bags.u.weight": torch.ones(7, 16),
            "over.bias": torch.ones(3),
            "over.scale": torch.ones(1),
        },
        "optimizer": {"lr": 0.1, "step": 3},
    }
    found = _saved(tmp_path, state)
    other = {
        "model": {
            "embedding_bags.t.core_0": torch.zeros(4, 4),
            "embedding_bags.t.core_1": torch.zeros(4, 64, dtype=torch.bfloat16),
            "embedding_bags.v.weight": torch.zeros(7, 16),
            "over.bias": torch.zeros(3),
            "over.scale": 1.0,
        },
        "optimizer": {"lr": torch.zeros(1), "momentum": 0.9, "step": 0},
    }
    before = copy.deepcopy(other)
    with pytest.raises(CheckpointError) as caught:
        found.load(other)
    head, *lines = str(caught.value).splitlines()
    assert "nothing has been loaded" in head
    assert [line.strip() for line in lines] == [
        "model/embedding_bags.t.core_0: shape (4, 8) in the checkpoint, (4, 4) in the state",
        "model/embedding_bags.t.core_1: dtype F32 in the checkpoint, BF16 in the state",
        "model/embedding_bags.v.weight: missing: is not in the checkpoint",
        "optimizer/lr: missing: is no tensor there",
        "model/over.scale: missing: is a tensor there",
        "optimizer/momentum: missing: is not in the checkpoint",
        "model/embedding_bags.u.weight: unexpected: is not in the state",
    ]
    assert same(other, before)
    assert caught.value.exit_code == 3


def test_a_long_list_of_differences_is_cut(tmp_path: Path) -> None:
    found = _saved(tmp_path, {"model": {str(at): torch.zeros(1) for at in range(100)}})
    with pytest.raises(CheckpointError, match=r"\.\.\. and 60 more"):
        found.load({"model": {}})


def test_a_part_of_a_checkpoint_loads_when_asked_to(tmp_path: Path) -> None:
    found = _saved(tmp_path, {"model": {"w": torch.ones(2)}, "optimizer": {"sum": torch.ones(2)}, "n": 1})
    part = {"model": {"w": torch.zeros(2)}}
    with pytest.raises(CheckpointError, match="optimizer/sum: unexpected"):
        found.load(part)
    found.load(part, ignore_unexpected=True)
    assert torch.equal(part["model"]["w"], torch.ones(2))
    with pytest.raises(CheckpointError, match="model/v: missing"):
        found.load({"model": {"v": torch.zeros(2)}}, ignore_unexpected=True)


def test_values_in_a_mapping_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    state = {"frozen": MappingProxyType({"lr": 0.1}), "w": torch.ones(1)}
    found = _saved(tmp_path, state)
    loaded = {"frozen": MappingProxyType({"lr": 0.5}), "w": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="frozen/lr: lies in a mappingproxy, which cannot be"):
        found.load(loaded)
    assert float(loaded["w"]) == 0


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (torch.zeros(2, dtype=torch.complex64), "no tensors of torch.complex64"),
        (torch.zeros(2, device="meta"), "on meta"),
        (torch.zeros(3).to_sparse(), "layout torch.sparse_coo"),
        (np.int64(3), "not int64"),
        (torch.float32, "not dtype"),
        ({1, 2}, "not set"),
        ([1, object()], "w/1: .* not object"),
        (b"bytes", "not bytes"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_named(tmp_path: Path, leaf: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"model/w.*{message}|model/{message}"):
        save_checkpoint(tmp_path, 1, {"model": {"w": leaf}}, {})
    assert not tmp_path.joinpath("LATEST").exists()


def test_dtensors_are_refused(tmp_path: Path) -> None:
    def save(rank: int) -> None:
        mesh = DeviceMesh("cpu", torch.arange(2))
        tensor = DTensor.from_local(torch.ones(2, 2), mesh, [Shard(0)], run_check=False)
        with pytest.raises(CheckpointError, match=r"w: a DTensor on cpu .* ShardedTensors"):
            save_checkpoint(tmp_path, 1, {"w": tensor}, {})

    on_ranks(2, save)


def test_two_keys_of_one_path_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="state/0: two keys of the state have this path"):
        save_checkpoint(tmp_path, 1, {"state": {0: 1, "0": 2}}, {})
    with pytest.raises(CheckpointError, match=r"ud800': a key is no valid Unicode"):
        save_checkpoint(tmp_path, 1, {"w\ud800": torch.zeros(1)}, {})
    with pytest.raises(CheckpointError, match="must be a mapping"):
        save_checkpoint(tmp_path, 1, [torch.zeros(1)], {})  # type: ignore[arg-type]


def test_names_in_the_file_are_of_one_tensor_each(tmp_path: Path) -> None:
    """Shards are named after their box: here other tensors bear those names, and the header's own."""
    full = torch.arange(6.0).reshape(3, 2)
    layout = [(0, (0, 0), (2, 2)), (0, (2, 0), (1, 2))]
    others = {name: torch.full((2, 2), 9.0 + at) for at, name in enumerate(["w[0:2,0:2]", "__metadata__"])}
    others["w[0:2,0:2]#"] = torch.full((2, 2), 7.0)
    on_ranks(1, lambda rank: save_checkpoint(tmp_path, 1, others | {"w": sharded(full, layout, rank)}, {}))
    found = latest_checkpoint(tmp_path)
    assert found is not None
    loaded = {"w": torch.zeros(3, 2)} | {name: torch.zeros(2, 2) for name in others}
    found.load(loaded)
    assert same(loaded, {"w": full, **others})


def test_the_files_are_plain_safetensors_with_readable_keys(tmp_path: Path) -> None:
    ebc = {"ebc.embedding_bags.t_cat_2.core_0": torch.randn(3, 4)}
    path = save_checkpoint(tmp_path, 7, {"model": ebc}, {"position": {"epoch": 1, "batch": 20}})
    assert path == tmp_path / "step-7"
    with safe_open(path / "rank-00000.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["model/ebc.embedding_bags.t_cat_2.core_0"]
        assert file.metadata()["file"] == "rank-00000.safetensors"
    manifest = json.loads((path / "manifest.json").read_text())["manifest"]
    assert manifest["step"] == 7
    assert manifest["extra"] == {"position": {"epoch": 1, "batch": 20}}
    assert manifest["versions"]["torch"] == torch.__version__
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.path, found.extra) == (7, path, manifest["extra"])


@settings(max_examples=200)
@given(data=st.data())
def test_tiling_is_what_counting_says(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=0, max_size=3)))
    boxes = []
    for _ in range(data.draw(st.integers(0, 4))):
        offsets = tuple(data.draw(st.integers(0, extent)) for extent in shape)
        sizes = tuple(data.draw(st.integers(0, extent)) for extent in shape)
        boxes.append(Box(offsets, sizes))
    counts = np.zeros(shape, dtype=int)
    inside = True
    for box in boxes:
        ends = [start + size for start, size in zip(box.offsets, box.sizes, strict=True)]
        inside &= all(end <= extent for end, extent in zip(ends, shape, strict=True)) and 0 not in box.sizes
        counts[tuple(slice(start, end) for start, end in zip(box.offsets, ends, strict=True))] += 1
    assert (untiled(shape, boxes) is None) == (inside and bool((counts == 1).all()))


def test_errors_are_of_the_house() -> None:
    error = DiskFullError("full", needed=10, free=3)
    assert isinstance(error, CheckpointError)
    assert isinstance(error, RecembError)
    assert (error.exit_code, error.needed, error.free) == (3, 10, 3)


def test_many_files_take_time_in_proportion(tmp_path: Path) -> None:
    """Looking through all shards for each file, and all files for each shard, takes ten times as long."""
    names = [f"rank-{rank:05d}.safetensors" for rank in range(20_000)]
    shards = [StoredShard(file=name, name="w", offsets=[0], sizes=[1], crc32=[0]) for name in names]
    tensors = [StoredTensor(dtype="F32", shape=[1], shards=[shard]) for shard in shards]
    manifest = Manifest(
        format_version=1,
        save_id="0" * 32,
        step=1,
        world_size=len(names),
        versions={},
        files=names,
        tensors=dict(zip(names, tensors, strict=True)),
        values={},
        extra={},
    )
    (tmp_path / "manifest.json").write_bytes(manifest.to_bytes())
    started = time.process_time()
    read = Manifest.read(tmp_path)
    for name in names[:1000]:
        with pytest.raises(CheckpointError, match="missing"):
            read.open_file(tmp_path, name)
    assert time.process_time() - started < 3
