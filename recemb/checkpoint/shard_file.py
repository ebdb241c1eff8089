"""A rank's ``rank-00000.safetensors``: written and read in blocks of rows, each with a checksum.

The file is plain safetensors, which anyone can open. It is written block by block rather than through the
library, which wants the whole of every tensor in host memory; and read with ``preadv`` rather than through
the library's memory map, in which a bad disk sector kills the process and all of the file counts as memory.
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
    starts = _starts(dtype, sizes)
    for start in starts:
        yield start, min(start + starts.step, starts.stop)


def num_blocks(dtype: str, sizes: Sequence[int]) -> int:
    """How many :func:`blocks` there are, without counting them: ``sizes`` may be anything."""
    rows = _starts(dtype, sizes)
    return -(-rows.stop // rows.step)


def layout(
    tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The header of a file with these tensors (name -> type and shape), and where in it each of them starts.

    Equal bytes for equal arguments: a file whose header is another one is refused without parsing it.
    """
    described: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    starts, end = {}, 0
    # Wide types first, as the library does: every tensor is aligned to its elements.
    ordered = sorted(tensors.items(), key=lambda item: (-DTYPES[item[1][0]].itemsize, item[0]))
    for name, (dtype, sizes) in ordered:
        starts[name], end = end, end + num_bytes(dtype, sizes)
        described[name] = {"dtype": dtype, "shape": list(sizes), "data_offsets": [starts[name], end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, list[int]]:
    """Write the tensors and sync the file; at most one block of them is in host memory.

    Args:
        tensors: on any device; need not be contiguous.
        metadata: for the header.

    Returns:
        the CRC-32 of each block, by name.
    """
    kinds = {name: (_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    header, starts = layout(kinds, metadata)
    checksums: dict[str, list[int]] = {}
    with _new_file(path) as descriptor:
        _write_all(descriptor, header)
        for name in starts:
            rows = tensors[name] if tensors[name].dim() else tensors[name].reshape(1)
            checksums[name] = []
            for start, stop in blocks(*kinds[name]):
                data = _bytes_of(rows[start:stop])
                checksums[name].append(zlib.crc32(data))
                _write_all(descriptor, data)
    return checksums


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file and sync it."""
    with _new_file(path) as descriptor:
        _write_all(descriptor, content)


class ShardFile:
    """An open file whose size and header are those that the manifest describes.

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
            self._starts = self._check(metadata)
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
        data = torch.empty(num_bytes(dtype, (stop - start, *row)), dtype=torch.uint8, device="cpu")
        at = self._starts[name] + num_bytes(dtype, (start, *row))
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
                    self._starts[name] + num_bytes(dtype, (rows, *sizes[1:])) for rows in (start, stop)
                )
                crc = 0
                while at < end:
                    part = buffer[: min(end - at, BLOCK_BYTES)]
                    self._fill(part, at, name)
                    crc = zlib.crc32(part, crc)
                    at += len(part)
                self._compare(name, block, crc)

    def _check(self, metadata: Mapping[str, str]) -> dict[str, int]:
        kinds = {name: (dtype, sizes) for name, (dtype, sizes, _) in self._tensors.items()}
        header, starts = layout(kinds, metadata)
        data = sum(num_bytes(*kind) for kind in kinds.values())
        size = os.fstat(self._descriptor).st_size
        if size != len(header) + data:
            raise CheckpointError(
                f"{self.path}: has {size:,} bytes of {len(header) + data:,}; truncated or damaged"
            )
        found = memoryview(bytearray(len(header)))
        self._fill(found, 0, "header")
        if found != header:
            raise CheckpointError(
                f"{self.path}: its header is not the one that the manifest describes: the file is damaged, "
                "or files of ranks or checkpoints have been swapped"
            )
        return starts

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


def _starts(dtype: str, sizes: Sequence[int]) -> range:
    return range(0, sizes[0] if sizes else 1, max(1, BLOCK_BYTES // max(1, num_bytes(dtype, sizes[1:]))))


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
