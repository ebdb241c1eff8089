"""A rank's ``rank-00000.safetensors``: written and read in blocks of rows, each with a checksum.

The file is plain safetensors, which the library checks and anyone can open. It is written block by block
rather than through the library, which wants the whole of every tensor in host memory; and read with
``preadv`` rather than through the library's memory map, in which a bad disk sector kills the process.
"""

from __future__ import annotations

import json
import math
import os
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from recemb.checkpoint.tree import DTYPES
from recemb.errors import CheckpointError

# A block is as many whole rows as fit, at least one. Part of the format: checksums are of blocks.
BLOCK_BYTES: Final = 2**24
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


def num_bytes(dtype: str, sizes: Sequence[int]) -> int:
    """Bytes of a tensor of safetensors' type ``dtype``."""
    return math.prod(sizes) * DTYPES[dtype].itemsize


def blocks(dtype: str, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The rows [start, stop) of each block of a tensor; a scalar is one row."""
    rows = sizes[0] if sizes else 1
    step = max(1, BLOCK_BYTES // max(1, num_bytes(dtype, sizes[1:])))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def header(tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file with these tensors (name -> type and shape), in this order."""
    described: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, sizes) in tensors.items():
        start, end = end, end + num_bytes(dtype, sizes)
        described[name] = {"dtype": dtype, "shape": list(sizes), "data_offsets": [start, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, list[int]]:
    """Write the tensors and sync the file; at most one block of them is in host memory.

    Args:
        tensors: on any device; need not be contiguous.
        metadata: for the header.

    Returns:
        the CRC-32 of each block, by name.
    """
    # Wide types first, as the library does: every tensor is aligned to its elements.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))
    described = {name: (_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in ordered.items()}
    checksums: dict[str, list[int]] = {}
    with _new_file(path) as descriptor:
        _write_all(descriptor, header(described, metadata))
        for name, tensor in ordered.items():
            rows = tensor if tensor.dim() else tensor.reshape(1)
            checksums[name] = []
            for start, stop in blocks(*described[name]):
                data = _bytes_of(rows[start:stop])
                checksums[name].append(zlib.crc32(data))
                _write_all(descriptor, data)
    return checksums


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file and sync it."""
    with _new_file(path) as descriptor:
        _write_all(descriptor, content)


class ShardFile:
    """An open file whose header has been checked: names, types, shapes, no gaps, no overlaps, its size.

    Args:
        path: the file.
        tensors: name -> type, shape and the CRC-32 of each block, as the manifest has them.
        metadata: what the header must hold.

    Raises:
        CheckpointError: names the file, and the tensor.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[str, Sequence[int], Sequence[int]]],
        metadata: Mapping[str, str],
    ) -> None:
        self.path, self._tensors = path, tensors
        self._descriptor = open_regular(path)
        try:
            self._offsets = self._check(metadata)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, name: str, block: int, start: int, stop: int) -> Tensor:
        """The rows [start, stop) of ``name``, which are its block number ``block``.

        Raises:
            CheckpointError: they are not what was written.
        """
        dtype, sizes, _ = self._tensors[name]
        row = tuple(sizes[1:])
        data = torch.empty(num_bytes(dtype, (stop - start, *row)), dtype=torch.uint8)
        at = self._offsets[name] + num_bytes(dtype, (start, *row))
        view = data.numpy().data
        self._fill(view, at, name)
        self._compare(name, block, zlib.crc32(view))
        return data.view(DTYPES[dtype]).reshape(stop - start, *row)

    def verify(self) -> None:
        """Read everything and compare its checksums.

        Raises:
            CheckpointError: names the tensor that is not what was written.
        """
        buffer = memoryview(bytearray(BLOCK_BYTES))
        for name, (dtype, sizes, _) in self._tensors.items():
            for block, (start, stop) in enumerate(blocks(dtype, sizes)):
                at, end = (
                    self._offsets[name] + num_bytes(dtype, (rows, *sizes[1:])) for rows in (start, stop)
                )
                crc = 0
                while at < end:
                    part = buffer[: min(end - at, BLOCK_BYTES)]
                    self._fill(part, at, name)
                    crc = zlib.crc32(part, crc)
                    at += len(part)
                self._compare(name, block, crc)

    def _check(self, metadata: Mapping[str, str]) -> dict[str, int]:
        size = os.fstat(self._descriptor).st_size
        try:
            with safe_open(self.path, framework="numpy") as opened:
                found = dict(opened.metadata() or {})
                names = opened.offset_keys()
                slices = {name: opened.get_slice(name) for name in names}
                described = {
                    name: (str(each.get_dtype()), tuple(each.get_shape())) for name, each in slices.items()
                }
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: truncated or damaged ({error})") from None
        for key, value in metadata.items():
            if found.get(key) != value:
                raise CheckpointError(
                    f"{self.path}: is another file than the manifest's: its {key} is {found.get(key)!r}, "
                    f"not {value!r}; files have been swapped or mixed"
                )
        for name in [*self._tensors, *described]:
            own = self._tensors.get(name)
            if own is None or name not in described or described[name] != (own[0], tuple(own[1])):
                raise CheckpointError(
                    f"{self.path}: {name}: the file has {described.get(name)} and the manifest "
                    f"{own if own is None else (own[0], tuple(own[1]))}"
                )
        data = sum(num_bytes(*kind) for kind in described.values())
        offsets, at = {}, size - data
        # The library has checked that the tensors lie one behind the other, up to the end of the file.
        for name in names:
            offsets[name] = at
            at += num_bytes(*described[name])
        return offsets

    def _fill(self, view: memoryview, at: int, name: str) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], at + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: {name}: cannot be read: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(f"{self.path}: {name}: the file ends before the tensor does")
            done += count

    def _compare(self, name: str, block: int, crc: int) -> None:
        if crc != self._tensors[name][2][block]:
            raise CheckpointError(
                f"{self.path}: {name}: its bytes are not those that were written (CRC-32 {crc:08x}, not "
                f"{self._tensors[name][2][block]:08x}, in block {block})"
            )


def open_regular(path: Path) -> int:
    """Open ``path`` for reading when it is a file itself: no link, pipe or device.

    Raises:
        CheckpointError: it is not, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: is no regular file")
    return descriptor


@contextmanager
def _new_file(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _bytes_of(rows: Tensor) -> memoryview:
    return rows.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
