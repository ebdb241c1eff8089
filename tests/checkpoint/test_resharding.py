"""F32: what any ranks and shards saved, any others load, bit for bit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from recemb.checkpoint import latest_checkpoint, save_checkpoint, shard_file
from recemb.errors import CheckpointError
from tests.checkpoint.ranks import Layout, bits, local, on_ranks, sharded

ROWS, COLUMNS = 10, 8


def one_shard(world: int) -> Layout:
    return [(world - 1, (0, 0), (ROWS, COLUMNS))]


def row_wise(world: int) -> Layout:
    # As torchrec: ceil(rows / world) on each rank, so that the last has fewer, or none.
    block = -(-ROWS // world)
    starts = [min(rank * block, ROWS) for rank in range(world + 1)]
    return [(rank, (starts[rank], 0), (starts[rank + 1] - starts[rank], COLUMNS)) for rank in range(world)]


def column_wise(world: int) -> Layout:
    width = COLUMNS // 4
    return [(part % world, (0, part * width), (ROWS, width)) for part in range(4)]


def grid(world: int) -> Layout:
    half = COLUMNS // 2
    return [
        ((2 * part + side) % world, (row, side * half), (size, half))
        for part, (row, size) in enumerate([(0, 3), (3, 7)])
        for side in (0, 1)
    ]


LAYOUTS = {"one-shard": one_shard, "row-wise": row_wise, "column-wise": column_wise, "grid": grid}


def table(dtype: torch.dtype = torch.float32) -> Tensor:
    """[10, 8]: more rows than four ranks share evenly."""
    generator = torch.Generator().manual_seed(ROWS)
    return torch.randn(ROWS, COLUMNS, generator=generator).to(dtype)


def _state(full: Tensor, layout: Layout | None, rank: int) -> dict[str, Any]:
    tensor = full.clone() if layout is None else sharded(full, layout, rank)
    return {"model": {"embedding_bags.t.weight": tensor, "over.weight": full[:3].clone()}, "step": 3}


def _save(root: Path, world: int, full: Tensor, layout: Layout | None) -> None:
    on_ranks(world, lambda rank: save_checkpoint(root, 3, _state(full, layout, rank), {}))


def _load(root: Path, world: int, full: Tensor, layout: Layout | None) -> None:
    """Load into zeros, and compare what every rank then holds."""

    def load(rank: int) -> None:
        state = _state(torch.zeros_like(full), layout, rank)
        found = latest_checkpoint(root)
        assert found is not None
        found.load(state)
        model = state["model"]
        assert bits(model["over.weight"]) == bits(full[:3])
        tensor = model["embedding_bags.t.weight"]
        parts = local(tensor) if isinstance(tensor, ShardedTensor) else [((...,), tensor)]
        for where, part in parts:
            assert bits(part) == bits(full[where])

    on_ranks(world, load)


@pytest.mark.parametrize("saved_by", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_f32_every_layout_and_world_loads_every_other(layout: str, saved_by: int, tmp_path: Path) -> None:
    full = table()
    _save(tmp_path, saved_by, full, LAYOUTS[layout](saved_by))
    for world in (1, 2, 4):
        _load(tmp_path, world, full, None)
        for wanted in LAYOUTS.values():
            _load(tmp_path, world, full, wanted(world))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_f32_unsharded_to_sharded(world: int, tmp_path: Path) -> None:
    full = table(torch.bfloat16)
    _save(tmp_path, 1, full, None)
    for wanted in LAYOUTS.values():
        _load(tmp_path, world, full, wanted(world))


@st.composite
def _layouts(draw: st.DrawFn, shape: tuple[int, ...], world: int) -> Layout:
    """Any tiling by cuts in each dimension, on any ranks."""
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for extent in shape:
        cuts = draw(st.sets(st.integers(0, extent), max_size=3)) | {0, extent}
        edges = sorted(cuts)
        spans = list(pairwise(edges))
        boxes = [((*o, a), (*s, b - a)) for o, s in boxes for a, b in spans]
    return [(draw(st.integers(0, world - 1)), offsets, sizes) for offsets, sizes in boxes]


@settings(max_examples=40)
@given(data=st.data())
def test_f32_any_layout_to_any_layout_is_the_identity(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]))
    worlds = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    layouts = [data.draw(_layouts(shape, world)) for world in worlds]
    full = torch.randint(0, 200, shape).to(dtype)
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        # Small tensors in many blocks: their edges fall inside shards too.
        patch.setattr(shard_file, "BLOCK_BYTES", data.draw(st.sampled_from([1, 16, 50, 2**24])))
        root = Path(name)
        _save(root, worlds[0], full, layouts[0])
        _load(root, worlds[1], full, layouts[1])


def test_f32_a_tensor_that_one_rank_holds_moves_to_another(tmp_path: Path) -> None:
    """The optimizer state of a table-wise table is a plain tensor on its rank, and absent elsewhere."""

    def state(owner: int, rank: int, value: float) -> dict[str, Any]:
        own = {"sum": torch.full((4, 3), value), "step": 7 if value else 0} if rank == owner else {}
        return {"optimizer": {"state": {"embedding_bags.t.weight": own}}}

    on_ranks(2, lambda rank: save_checkpoint(tmp_path, 1, state(1, rank, 5.0), {}))

    def load(rank: int) -> dict[str, Any]:
        mine = state(2, rank, 0.0)
        found = latest_checkpoint(tmp_path)
        assert found is not None
        found.load(mine)
        return mine

    loaded = on_ranks(4, load)[2]["optimizer"]["state"]["embedding_bags.t.weight"]
    assert loaded["step"] == 7
    assert torch.equal(loaded["sum"], torch.full((4, 3), 5.0))


def test_replicated_tensors_are_written_once_and_spread_over_the_ranks(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = {f"over.{at}.weight": torch.randn(50, 10, generator=generator) for at in range(8)}
    on_ranks(4, lambda rank: save_checkpoint(tmp_path, 1, {"model": dict(layers)}, {}))
    files = [load_file(path) for path in sorted((tmp_path / "step-1").glob("*.safetensors"))]
    assert [len(file) for file in files] == [2, 2, 2, 2]
    assert {key for file in files for key in file} == {f"model/{key}" for key in layers}


def test_every_rank_writes_its_own_shards(tmp_path: Path) -> None:
    full = table()
    _save(tmp_path, 2, full, row_wise(2))
    for rank, rows in enumerate([(0, 5), (5, 10)]):
        file = load_file(tmp_path / "step-3" / f"rank-0000{rank}.safetensors")
        name = f"model/embedding_bags.t.weight[{rows[0]}:{rows[1]},0:8]"
        assert torch.equal(file[name], full[slice(*rows)])


def test_a_rank_reads_only_the_blocks_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_file, "BLOCK_BYTES", 4 * COLUMNS)
    full = table()
    _save(tmp_path, 1, full, None)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    read: list[tuple[str, int]] = []
    inner = shard_file.ShardFile.read

    def record(self: Any, name: str, block: int, start: int, stop: int) -> Tensor:
        read.append((name, block))
        return inner(self, name, block, start, stop)

    monkeypatch.setattr(shard_file.ShardFile, "read", record)
    layout = [(0, (2, 0), (3, 4)), (1, (0, 0), (2, 8)), (1, (5, 0), (5, 8)), (1, (2, 4), (3, 4))]
    on_ranks(
        2,
        lambda rank: (
            latest_checkpoint(tmp_path).load(_state(torch.zeros_like(full), layout, rank))  # type: ignore[union-attr]
            if rank == 0
            else latest_checkpoint(tmp_path).load(  # type: ignore[union-attr]
                {"model": {}, "step": 0}, ignore_unexpected=True
            )
        ),
    )
    assert [block for name, block in read if name == "model/embedding_bags.t.weight"] == [2, 3, 4]


def test_f32_ranks_that_disagree_are_refused(tmp_path: Path) -> None:
    def save(rank: int) -> Path:
        return save_checkpoint(tmp_path, 1, {"own": torch.zeros(rank + 1)}, {})

    with pytest.raises(
        CheckpointError, match=r"own: is F32 of shape \(2,\) on rank 1 and F32 of shape \(1,\)"
    ):
        on_ranks(2, save)
    with pytest.raises(CheckpointError, match=r"step=\[0, 1\]"):
        on_ranks(2, lambda rank: save_checkpoint(tmp_path, rank, {}, {}))
    with pytest.raises(CheckpointError, match="a: is a tensor on one rank and none on another"):
        on_ranks(2, lambda rank: save_checkpoint(tmp_path, 1, {"a": torch.zeros(1) if rank else 0}, {}))
    assert not (tmp_path / "step-1").exists()


def test_f32_a_misfit_on_one_rank_is_an_error_on_all_before_anything_is_written(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"a": torch.ones(3), "b": torch.ones(2)}, {})
    states = [{"a": torch.zeros(3), "b": torch.zeros(2)}, {"a": torch.zeros(3), "b": torch.zeros(5)}]
    messages = []

    def load(rank: int) -> None:
        found = latest_checkpoint(tmp_path)
        assert found is not None
        with pytest.raises(
            CheckpointError, match=r"b: shape \(2,\) in the checkpoint, \(5,\) in the state"
        ) as e:
            found.load(states[rank])
        messages.append(str(e.value))

    on_ranks(2, load)
    assert messages[0] == messages[1]
    assert not any(bool(tensor.any()) for state in states for tensor in state.values())


def test_a_failure_on_one_rank_is_an_error_on_all_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = shard_file.write

    def write(path: Path, *rest: Any) -> Any:
        if "rank-00001" in path.name:
            raise OSError(5, "Input/output error", str(path))
        return inner(path, *rest)

    monkeypatch.setattr(shard_file, "write", write)
    messages = {}

    def save(rank: int) -> None:
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(tmp_path, 3, _state(table(), row_wise(2), rank), {})
        messages[rank] = str(caught.value)

    on_ranks(2, save)
    assert "Input/output error" in messages[1]
    assert messages[0] == f"rank 1: {messages[1]}"
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
