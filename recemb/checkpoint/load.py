"""Finding the newest checkpoint that is whole, and reading from it what a rank needs."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from recemb.backends.stored_settings import SHARED_WITH, misfits
from recemb.cache.loading import policy_of
from recemb.checkpoint import folder
from recemb.checkpoint.boxes import Box
from recemb.checkpoint.manifest import Manifest, StoredShard, StoredTensor
from recemb.checkpoint.ranks import Ranks
from recemb.checkpoint.shard_file import ShardFile, blocks
from recemb.checkpoint.tree import FlatState, Piece, flatten
from recemb.errors import CheckpointError

# Of a state that does not fit, as many differences are listed.
_MAX_LINES = 40

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        path: its directory.
        step: of training.
        extra: what the caller saved beside the state.
    """

    path: Path
    step: int
    extra: dict[str, Any]
    _manifest: Manifest = field(repr=False)
    _ranks: Ranks = field(repr=False)

    def load(self, state: Mapping[str, Any], *, ignore_unexpected: bool = False) -> None:
        """Fill ``state`` in place; every rank calls it, each with the state of its own plan.

        Tensors are written to where they are, whatever the ranks and shards that saved them: a rank reads the
        16 MiB blocks that hold rows of its shards. Other values are put into the mapping or list that holds
        them. Objects made from copies, and settings that are no tensors, still need their own
        ``load_state_dict(state[...])`` afterwards, as torch's optimizers and torchrec's do.

        Args:
            state: of the structure that was saved. An optimizer whose state torch makes at its first step
                must have taken one (of learning rate 0, say).
            ignore_unexpected: whether the checkpoint may hold more, for example the optimizer's state when
                only the model is loaded.

        Raises:
            CheckpointError: before anything is written: all differences in keys, shapes, types, tables'
                settings (see :mod:`recemb.torchrec_io.stored_settings`) and policies of caches, on every
                rank. After that only when a file has been damaged since it was verified.
        """
        told = self._ranks.together(lambda: self._compare(flatten(state)))
        wanted = {key for each in told for key in each["keys"]}
        stored = self._manifest.tensors.keys() | self._manifest.values.keys()
        wrong = dict.fromkeys(line for each in told for line in each["wrong"])
        if not ignore_unexpected:
            wrong |= dict.fromkeys(
                f"{key}: unexpected: is not in the state" for key in sorted(stored - wanted)
            )
        if wrong:
            raise CheckpointError(self._misfit(list(wrong)))
        try:
            self._ranks.together(lambda: self._fill(flatten(state)))
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}. It has changed since it was verified, and the state is loaded in part: call "
                "latest_checkpoint again and load what that finds"
            ) from error

    def _compare(self, flat: FlatState) -> dict[str, list[str]]:
        wrong = []
        for key, entry in flat.tensors.items():
            stored = self._manifest.tensors.get(key)
            if stored is None:
                other = "is no tensor there" if key in self._manifest.values else "is not in the checkpoint"
                wrong.append(f"{key}: missing: {other}")
                continue
            for name, there, here in (
                ("shape", tuple(stored.shape), entry.shape),
                ("dtype", stored.dtype, entry.dtype),
            ):
                if there != here:
                    wrong.append(f"{key}: {name} {there} in the checkpoint, {here} in the state")
        for key, value in flat.values.items():
            if key not in self._manifest.values:
                other = "is a tensor there" if key in self._manifest.tensors else "is not in the checkpoint"
                wrong.append(f"{key}: missing: {other}")
            elif not value.replaceable():
                wrong.append(f"{key}: lies in a {type(value.parent).__name__}, which cannot be written to")
        wrong += self._other_settings(flat) + self._other_policies(flat)
        return {"keys": flat.keys, "wrong": wrong}

    def _other_settings(self, flat: FlatState) -> list[str]:
        """Tables whose tensors fit, and are other rows to them."""
        wrong = []
        for key, tables in flat.settings.items():
            bags = f"{key}{'.' if key and not key.endswith('/') else ''}embedding_bags."
            there = [t for t in tables if any(name.startswith(f"{bags}{t}.") for name in flat.keys)]
            # Of tables that share a storage one alone has keys.
            shared = {tables[t].get(SHARED_WITH, t) for t in there}
            own = {t: settings for t, settings in tables.items() if settings.get(SHARED_WITH, t) in shared}
            for table, name, theirs, value in misfits(own, self._manifest.settings.get(key)):
                wrong.append(
                    f"{key}: table {table!r}: {name} {theirs!r} in the checkpoint, {value!r} in the state"
                )
        return wrong

    def _other_policies(self, flat: FlatState) -> list[str]:
        """Caches whose counters are of another policy, read from the files; no settings say so."""
        wrong = []
        for key, entry in flat.tensors.items():
            stored = self._manifest.tensors.get(key)
            if not key.endswith(".cache.owners") or stored is None or len(entry.shape) != 1:
                continue
            if (tuple(stored.shape), stored.dtype) != (entry.shape, entry.dtype):
                continue
            # The rank that holds the last of them; each of them, where they are replicated.
            held = [p.tensor for p in entry.pieces if p.offsets[0] + p.sizes[0] == entry.shape[0]]
            own = policy_of(held[0]) if held else None
            if own is None:
                continue
            mark = Piece(torch.empty(1, dtype=held[0].dtype), (entry.shape[0] - 1,))
            for shard, piece in _overlapping(stored, [mark]):
                with self._manifest.open_file(self.path, shard.file) as file:
                    _copy(file, stored.dtype, shard, piece)
            theirs = policy_of(mark.tensor)
            if theirs not in (own, None):
                wrong.append(f"{key}: policy {theirs!r} in the checkpoint, {own!r} in the state")
        return wrong

    def _misfit(self, wrong: list[str]) -> str:
        lines = wrong[:_MAX_LINES]
        if len(wrong) > len(lines):
            lines.append(f"... and {len(wrong) - len(lines)} more")
        return "\n  ".join(
            [
                f"{self.path}: was saved from another model, optimizer or setting; nothing has been loaded. "
                "Build them as they were saved, or start without this checkpoint:",
                *lines,
            ]
        )

    def _fill(self, flat: FlatState) -> None:
        filled: set[Any] = set()
        with ExitStack() as stack:
            files: dict[str, ShardFile] = {}
            for key, entry in flat.tensors.items():
                stored = self._manifest.tensors[key]
                for shard, piece in _overlapping(stored, entry.pieces):
                    # One array under several keys is read once.
                    memory = shard.file, shard.name, shard.box, piece.offsets, piece.storage
                    if memory in filled:
                        continue
                    filled.add(memory)
                    if shard.file not in files:
                        opened = self._manifest.open_file(self.path, shard.file)
                        files[shard.file] = stack.enter_context(opened)
                    _copy(files[shard.file], stored.dtype, shard, piece)
        for key, value in flat.values.items():
            value.replace(self._manifest.values[key])


def latest_checkpoint(root: Path, *, group: dist.ProcessGroup | None = None) -> Checkpoint | None:
    """The newest checkpoint under ``root`` that is complete and whose every byte is what was written.

    One that is not is skipped with a warning that names the file and what is wrong with it. Every rank calls
    this, verifies its part of the files, and gets the same checkpoint.

    Args:
        root: as given to :func:`recemb.checkpoint.save_checkpoint`.
        group: the ranks; ``None`` for the default group.

    Returns:
        ``None`` when nothing has been saved there.

    Raises:
        CheckpointError: checkpoints are there, and each is damaged: starting from nothing must be asked for.
    """
    ranks, root = Ranks(group), Path(root)
    listed = ranks.together(lambda: _list(root) if ranks.rank == 0 else None)[0]
    reasons = []
    for step, name in listed or []:
        try:
            manifest = _verified(root / name, step, ranks)
        except CheckpointError as error:
            reasons.append(str(error))
            if ranks.rank == 0:
                log.warning("skipped the checkpoint %s: %s", name, error)
            continue
        return Checkpoint(root / name, step, manifest.extra, manifest, ranks)
    if reasons:
        raise CheckpointError(
            f"{root}: none of its {len(reasons)} checkpoints can be loaded; restore one, or remove them to "
            "start from nothing:\n  " + "\n  ".join(reasons)
        )
    return None


def _list(root: Path) -> list[tuple[int, str]]:
    for name in folder.unfinished(root):
        log.warning("%s: skipped: was not finished", root / name)
    return folder.complete(root)


def _verified(path: Path, step: int, ranks: Ranks) -> Manifest:
    manifest: list[Manifest] = []

    def read() -> int:
        manifest.append(Manifest.read(path))
        return zlib.crc32(json.dumps(manifest[0].model_dump(), sort_keys=True).encode())

    if len(set(ranks.together(read))) > 1:
        raise CheckpointError(f"{path}: ranks see different manifests; all must share one file system")
    ranks.together(lambda: _verify(path, step, manifest[0], ranks))
    return manifest[0]


def _verify(path: Path, step: int, manifest: Manifest, ranks: Ranks) -> None:
    if manifest.step != step:
        raise CheckpointError(f"{path}: holds step {manifest.step}; directories have been renamed")
    own = sorted(manifest.files)[ranks.rank :: ranks.size]
    # All headers before any contents: what is missing is found at once.
    for name in own:
        manifest.open_file(path, name).close()
    for name in own:
        with manifest.open_file(path, name) as file:
            file.verify()


def _overlapping(stored: StoredTensor, pieces: list[Piece]) -> Iterator[tuple[StoredShard, Piece]]:
    for shard in stored.shards:
        for piece in pieces:
            if shard.box.overlap(Box(piece.offsets, piece.sizes)) is not None:
                yield shard, piece


@torch.no_grad()
def _copy(file: ShardFile, dtype: str, shard: StoredShard, piece: Piece) -> None:
    """Copy the elements in both the stored shard and the wanted piece, block by block."""
    wanted = Box(piece.offsets, piece.sizes)
    for number, (start, stop) in enumerate(blocks(dtype, shard.sizes)):
        # A scalar is a block of one row, and all there is.
        box = shard.box
        if shard.sizes:
            offsets = (shard.offsets[0] + start, *shard.offsets[1:])
            box = Box(offsets, (stop - start, *shard.sizes[1:]))
        both = box.overlap(wanted)
        if both is not None:
            rows = file.read(shard.name, number, start, stop).reshape(box.sizes)
            piece.tensor[both.inside(wanted)].copy_(rows[both.inside(box)])
