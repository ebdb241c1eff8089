"""Writing a checkpoint: every rank its part, then one rename that makes it exist."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from recemb.checkpoint import folder, shard_file
from recemb.checkpoint.boxes import Box
from recemb.checkpoint.manifest import (
    MANIFEST_FILE,
    Manifest,
    StoredShard,
    StoredTensor,
    is_complete,
)
from recemb.checkpoint.placement import Placed, PlacedTensor, offer, place
from recemb.checkpoint.ranks import Ranks
from recemb.checkpoint.tree import FlatState, flatten, plain
from recemb.errors import CheckpointError
from recemb.files import sync_directory
from recemb.stack import versions
from recemb_kernels.triton_frame.verdict import poll

# `extra` is read whole by every rank, before anything else is known of a checkpoint.
_MAX_EXTRA_BYTES = 2**24
# For the manifest, of each tensor and of each block, when free space is estimated.
_BYTES_PER_TENSOR, _BYTES_PER_BLOCK = 500, 12


def save_checkpoint(
    root: Path,
    step: int,
    state: Mapping[str, Any],
    extra: Mapping[str, Any],
    *,
    keep: int = 2,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Save ``state`` as ``root/step-<step>``, which exists whole or not at all whenever the process dies.

    Every rank calls it; a failure on one is raised on all. Each writes the shards that it holds. A plain
    tensor that several ranks hold is taken for replicated and written by one of them, as evenly as sizes
    allow; one that a single rank holds, such as the optimizer state of its tables, is written by that rank.
    Memory that has several keys is written once. Tensors pass through host memory 16 MiB at a time, or one
    row where a row is larger.

    Args:
        root: directory of the run's checkpoints, on a file system that all ranks see. It belongs to the first
            process that saves there, until that ends.
        step: >= 0; order among the checkpoints. One of the same step is replaced. Those of later steps are of
            training that was given up, and are renamed so that nothing loads them.
        state: nested mappings of tensors, ``ShardedTensor``s and JSON values, e.g. ``{"model":
            model.state_dict(), "optimizer": optimizer.state_dict()}``. Of a value that differs between ranks
            the first rank's is kept.
        extra: JSON of at most 16 MiB: data position, RNG states, configuration. Rank 0's is kept; what each
            rank has of its own goes in as a list.
        keep: how many of the newest checkpoints stay.
        group: the ranks; ``None`` for the default group. Ranks wait for the slowest writer: its timeout must
            allow for that.

    Returns:
        the checkpoint's directory.

    Raises:
        DiskFullError: with the bytes needed and free. As after every error here, the checkpoints before are
            intact, and nothing is left of this one.
        CheckpointError: something that a checkpoint cannot hold, ranks that do not fit together, a directory
            that cannot be written or that another run uses.
        BatchError, NonFiniteError: of an earlier look-up or step, which a GPU has found by now.
        RankLost: of several ranks, one failed otherwise (its memory ran out), and logged how.
    """
    ranks, root = Ranks(group), Path(root)
    told = ranks.together(lambda: _describe(step, keep, state, extra))
    _check_agreement(told)
    placed = place([each["tensors"] for each in told])
    needed = _estimate(placed, told)
    prepared = ranks.together(lambda: _prepare(root, step, needed) if ranks.rank == 0 else None)
    temporary = root / str(prepared[0])
    try:
        written = ranks.together(lambda: _write_own(temporary, placed, flatten(state), ranks.rank, needed))
        ranks.together(
            lambda: (
                _commit(temporary, _manifest(step, temporary, placed, written, told), keep, needed)
                if ranks.rank == 0
                else None
            )
        )
    except BaseException:
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return root / folder.name_of(step)


def _describe(step: int, keep: int, state: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """What this rank was given, as JSON and without the tensors' elements."""
    # A step that a GPU has refused by now, of which the host has not heard, must not be counted as taken.
    poll(wait=True)
    for name, number, least in (("step", step, 0), ("keep", keep, 1)):
        if not isinstance(number, int) or isinstance(number, bool) or not least <= number < 10**18:
            raise CheckpointError(f"{name}={number!r} must be an int >= {least}")
    flat, kept = flatten(state), plain(extra, "extra")
    if len(json.dumps(kept)) > _MAX_EXTRA_BYTES:
        raise CheckpointError(
            f"extra takes {len(json.dumps(kept)):,} bytes, more than {_MAX_EXTRA_BYTES:,}; it is for "
            "settings and counters: keep arrays as tensors of the state"
        )
    return {
        "step": step,
        "keep": keep,
        "tensors": offer(flat),
        "values": {path: plain(value.value, path) for path, value in flat.values.items()},
        "settings": flat.settings,
        "extra": kept,
    }


def _check_agreement(told: Sequence[Mapping[str, Any]]) -> None:
    for name in ("step", "keep"):
        given = [each[name] for each in told]
        if len(set(given)) > 1:
            raise CheckpointError(
                f"the ranks save with {name}={given}, one for each rank; give them the same"
            )
    tensors = {path for each in told for path in each["tensors"]}
    values = {path for each in told for path in each["values"]}
    if tensors & values:
        raise CheckpointError(f"{min(tensors & values)}: is a tensor on one rank and none on another")


def _estimate(placed: Mapping[str, PlacedTensor], told: Sequence[Mapping[str, Any]]) -> int:
    """Bytes of the files, to within the headers' few thousand; memory of several keys counts once."""
    stored = {
        (piece.rank, piece.name): (tensor.dtype, piece.box.sizes)
        for tensor in placed.values()
        for piece in tensor.pieces
    }
    data = sum(shard_file.num_bytes(*kind) for kind in stored.values())
    names = sum(len(name) for _, name in stored) + sum(map(len, placed))
    described = _BYTES_PER_TENSOR * (len(stored) + len(placed)) + names
    described += _BYTES_PER_BLOCK * (data // shard_file.BLOCK_BYTES)
    return data + described + len(json.dumps([told[0][name] for name in ("extra", "values", "settings")]))


def _prepare(root: Path, step: int, needed: int) -> str:
    with folder.disk_errors(root, needed):
        folder.lock(root)
        folder.clear_unfinished(root)
        if folder.free_bytes(root) < needed:
            raise folder.disk_full(root, needed)
        temporary = folder.temporary_name(step)
        os.mkdir(root / temporary)
    return temporary


def _write_own(
    temporary: Path, placed: Mapping[str, PlacedTensor], flat: FlatState, rank: int, needed: int
) -> dict[str, list[int]]:
    """Write what this rank was chosen to write, in one file unless that is nothing; its checksums."""
    tensors: dict[str, Tensor] = {}
    for key, tensor in placed.items():
        for piece in tensor.pieces:
            if piece.rank == rank and piece.name not in tensors:
                tensors[piece.name] = _held(flat, key, piece.box)
    if not tensors:
        return {}
    name = _file_name(rank)
    with folder.disk_errors(temporary.parent, needed):
        checksums = shard_file.write(temporary / name, tensors, _header(temporary, name))
        sync_directory(temporary)
    return checksums


def _held(flat: FlatState, key: str, box: Box) -> Tensor:
    held = flat.tensors[key].pieces
    return next(piece.tensor for piece in held if Box(piece.offsets, piece.sizes) == box)


def _file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _header(temporary: Path, name: str) -> dict[str, str]:
    return {"save_id": temporary.name.rpartition("-")[2], "file": name}


def _manifest(
    step: int,
    temporary: Path,
    placed: Mapping[str, PlacedTensor],
    written: Sequence[Mapping[str, list[int]]],
    told: Sequence[Mapping[str, Any]],
) -> Manifest:
    values: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for each in reversed(told):
        values |= each["values"]
        settings |= each["settings"]
    tensors = {
        key: StoredTensor(
            dtype=tensor.dtype,
            shape=list(tensor.shape),
            shards=[_stored(piece, written[piece.rank]) for piece in tensor.pieces],
        )
        for key, tensor in placed.items()
    }
    return Manifest(
        format_version=2 if settings else 1,
        save_id=temporary.name.rpartition("-")[2],
        step=step,
        world_size=len(told),
        versions=versions(),
        files=[_file_name(rank) for rank, each in enumerate(written) if each],
        tensors=tensors,
        values=values,
        settings=settings,
        extra=told[0]["extra"],
    )


def _stored(piece: Placed, checksums: Mapping[str, list[int]]) -> StoredShard:
    return StoredShard(
        file=_file_name(piece.rank),
        name=piece.name,
        offsets=list(piece.box.offsets),
        sizes=list(piece.box.sizes),
        crc32=checksums[piece.name],
    )


def _commit(temporary: Path, manifest: Manifest, keep: int, needed: int) -> None:
    root = temporary.parent
    with folder.disk_errors(root, needed):
        try:
            for name in manifest.files:
                manifest.open_file(temporary, name).close()
        except CheckpointError as error:
            raise CheckpointError(
                f"rank 0 does not see what another rank wrote ({error}); on several machines checkpoints "
                "need a directory that all of them share"
            ) from error
        shard_file.write_synced(temporary / MANIFEST_FILE, manifest.to_bytes())
        folder.commit(root, temporary.name, manifest.step)
    folder.prune(root, keep, is_complete)
