"""``manifest.json``: what a checkpoint consists of, and the checksums that say whether it is still that."""

from __future__ import annotations

import json
import os
import zlib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recemb.checkpoint.boxes import Box, untiled
from recemb.checkpoint.shard_file import ShardFile, num_blocks, open_regular
from recemb.checkpoint.tree import DTYPES
from recemb.errors import CheckpointError

# 2 has settings. A key says how to read the rest, for all that a reader knows who does not know it: none is
# passed over, and each new one makes a new version. A file is of the first version that has all its keys.
FORMAT_VERSIONS: Final = (1, 2)
MANIFEST_FILE: Final = "manifest.json"
# A checkpoint of 10 TB has a manifest of 10 MB.
MAX_MANIFEST_BYTES: Final = 2**26
_LARGEST: Final = 2**62

_Count = Annotated[int, Field(ge=0, le=_LARGEST)]
_Sizes = Annotated[list[_Count], Field(max_length=64)]
_Crc = Annotated[int, Field(ge=0, lt=2**32)]
# Nothing but a name: no separators, no parents.
_FileName = Annotated[str, Field(pattern=r"\Arank-[0-9]{5,9}\.safetensors\z")]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class StoredShard(_Part):
    """Where a part of a tensor lies; ``name`` is its key in the file."""

    file: _FileName
    name: str
    offsets: _Sizes
    sizes: _Sizes
    crc32: list[_Crc]

    @property
    def box(self) -> Box:
        return Box(tuple(self.offsets), tuple(self.sizes))


class StoredTensor(_Part):
    """A tensor: its type by safetensors' name, its shape, and the shards that hold each element once."""

    dtype: str
    shape: _Sizes
    shards: list[StoredShard]


class Manifest(_Part):
    """All of a checkpoint but the tensors' bytes.

    Attributes:
        format_version: of this layout: 2 where there are settings.
        save_id: drawn for this save; in every file's header too.
        step: of training.
        world_size: ranks that saved.
        versions: of recemb and the packages below it.
        files: their names.
        tensors: by path in the state.
        values: the state's other leaves, by path.
        settings: of the collections in the state, by path and table; a file leaves none out.
        extra: the caller's.
    """

    format_version: Literal[1, 2]
    save_id: Annotated[str, Field(pattern=r"\A[0-9a-f]{32}\z")]
    step: _Count
    world_size: Annotated[int, Field(ge=1, le=10**9)]
    versions: dict[str, str]
    files: list[_FileName]
    tensors: dict[str, StoredTensor]
    values: dict[str, Any]
    settings: dict[str, Any] = {}
    extra: dict[str, Any]

    def to_bytes(self) -> bytes:
        """The file: ``{"crc32": ..., "manifest": ...}``.

        Raises:
            CheckpointError: too much of it.
        """
        body = _canonical(self.model_dump(exclude=None if self.settings else {"settings"}))
        text = f'{{"crc32":{zlib.crc32(body)},"manifest":'.encode() + body + b"}\n"
        if len(text) > MAX_MANIFEST_BYTES:
            raise CheckpointError(
                f"the manifest would take {len(text):,} bytes, more than {MAX_MANIFEST_BYTES:,}; `extra` and "
                "lists in the state are for settings and counters: keep arrays as tensors of the state"
            )
        return text

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Parse and check ``folder/manifest.json``; tensors' bytes are not read.

        Raises:
            CheckpointError: missing, damaged, of another format, or inconsistent; names the file.
        """
        path = folder / MANIFEST_FILE
        content = _parse(path, _read_bounded(path))
        version = content.get("format_version")
        if version not in FORMAT_VERSIONS:
            raise CheckpointError(
                f"{path}: has format version {version!r}, this recemb reads {FORMAT_VERSIONS}; load it with "
                "the recemb that wrote it"
            )
        try:
            manifest = cls.model_validate(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = "/".join(map(str, first["loc"]))
            raise CheckpointError(f"{path}: damaged: {where[:200]}: {first['msg']}") from None
        manifest._check(path)
        return manifest

    def open_file(self, folder: Path, name: str) -> ShardFile:
        """One file, open, its size and header checked.

        Raises:
            CheckpointError: names the file.
        """
        return ShardFile(folder / name, self._contents.get(name, {}), {"save_id": self.save_id, "file": name})

    @cached_property
    def _contents(self) -> dict[str, dict[str, tuple[str, list[int], list[int]]]]:
        """Of each file its tensors: name -> type, shape and checksums."""
        contents: dict[str, dict[str, tuple[str, list[int], list[int]]]] = {}
        for tensor in self.tensors.values():
            for shard in tensor.shards:
                contents.setdefault(shard.file, {})[shard.name] = tensor.dtype, shard.sizes, shard.crc32
        return contents

    def _check(self, path: Path) -> None:
        files = set(self.files)
        stored: dict[tuple[str, str], tuple[str, StoredShard]] = {}
        for key, tensor in self.tensors.items():
            if tensor.dtype not in DTYPES:
                raise CheckpointError(f"{path}: {key}: unknown type {tensor.dtype!r}")
            wrong = untiled(tensor.shape, [shard.box for shard in tensor.shards])
            if wrong is not None:
                raise CheckpointError(f"{path}: {key}: {wrong}")
            for shard in tensor.shards:
                if shard.file not in files:
                    raise CheckpointError(f"{path}: {key}: lies in {shard.file}, which is none of its files")
                if num_blocks(tensor.dtype, shard.sizes) != len(shard.crc32):
                    raise CheckpointError(f"{path}: {key}: has {len(shard.crc32)} checksums for {shard.box}")
                dtype, known = stored.setdefault((shard.file, shard.name), (tensor.dtype, shard))
                if (dtype, known.sizes, known.crc32) != (tensor.dtype, shard.sizes, shard.crc32):
                    raise CheckpointError(f"{path}: {key}: {shard.name} is described in two ways")
            if key in self.values:
                raise CheckpointError(f"{path}: {key}: is both a tensor and a value")


def is_complete(folder: Path) -> bool:
    """Whether the manifest and the headers of all files are right; tensors' bytes are not read."""
    try:
        manifest = Manifest.read(folder)
        for name in manifest.files:
            manifest.open_file(folder, name).close()
    except CheckpointError:
        return False
    return True


def _read_bounded(path: Path) -> bytes:
    descriptor = open_regular(path)
    with open(descriptor, "rb") as file:
        if os.fstat(descriptor).st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{path}: is larger than the {MAX_MANIFEST_BYTES:,} bytes a manifest has")
        try:
            return file.read(MAX_MANIFEST_BYTES)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
        body = content["manifest"]
        intact = isinstance(body, dict) and zlib.crc32(_canonical(body)) == content["crc32"]
    except (ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{path}: damaged: no manifest can be read from it ({error!r:.200})") from None
    if not intact:
        raise CheckpointError(f"{path}: damaged: its content does not have the checksum it was written with")
    return dict(body)


def _canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
