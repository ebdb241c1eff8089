"""A state, nested mappings of tensors and JSON values, seen as one flat mapping from paths.

The path of ``state["model"]["embedding_bags.t.weight"]`` is ``model/embedding_bags.t.weight``: keys of
state dicts stay as they are. A ``/`` or ``~`` inside a key is written ``~1`` or ``~0``, as in JSON pointers
(RFC 6901).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from recemb.errors import CheckpointError
from recemb.spec import SETTINGS_KEY

# The names that safetensors gives to torch's types.
DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
_SCALARS: Final = (bool, int, float, str, type(None))
# Python neither writes nor reads ints of more than 4,300 digits, unless told to.
_MAX_INT_BITS: Final = 14_000


@dataclass(frozen=True, eq=False)
class Piece:
    """The part of a tensor that this rank holds: ``tensor``, from ``offsets`` on in each dimension."""

    tensor: Tensor
    offsets: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def storage(self) -> tuple[Any, ...]:
        """Equal for two pieces whose elements are the same memory."""
        tensor = self.tensor
        return tensor.device, tensor.data_ptr(), tensor.dtype, self.sizes, tensor.stride()


@dataclass(frozen=True, eq=False)
class TensorEntry:
    """A tensor of the state.

    Attributes:
        dtype: safetensors' name of its type.
        shape: of the whole tensor, over all ranks.
        pieces: what this rank holds of it.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: list[Piece]


@dataclass(frozen=True, eq=False)
class Value:
    """A JSON value of the state, and where it is: ``parent[key]``."""

    value: Any
    parent: Any
    key: Any

    def replaceable(self) -> bool:
        """Whether another value can be put in its place."""
        return isinstance(self.parent, MutableMapping | list)

    def replace(self, value: Any) -> None:
        """Put ``value``, as read from JSON, in its place; a tuple stays a tuple."""
        self.parent[self.key] = _like(self.value, value)


@dataclass(eq=False)
class FlatState:
    """The leaves of a state by path.

    Attributes:
        tensors: among them.
        values: the others.
        settings: of the collections in its state dicts, by path, what each of their tables is read by.
    """

    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        return [*self.tensors, *self.values]


def flatten(state: Mapping[str, Any]) -> FlatState:
    """The leaves of ``state``: tensors, sharded tensors, JSON scalars and lists of those.

    Raises:
        CheckpointError: a leaf that a checkpoint cannot hold, or two keys of one path; names it.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(f"the state must be a mapping such as model.state_dict(), not {type(state)}")
    flat = FlatState()
    _walk(state, (), flat)
    return flat


def plain(value: Any, path: str) -> Any:
    """``value`` as JSON gives it back: tuples become lists.

    Raises:
        CheckpointError: it is not of JSON's types, or an int that JSON does not bring back.
    """
    if isinstance(value, Mapping):
        strange = [key for key in value if not isinstance(key, str)]
        if strange:
            raise CheckpointError(f"{path}: the key {strange[0]!r} is no str; checkpoints hold JSON")
        return {key: plain(item, f"{path}/{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{path}/{at}") for at, item in enumerate(value)]
    if not isinstance(value, _SCALARS):
        raise CheckpointError(
            f"{path}: a checkpoint holds tensors and JSON values, not {type(value).__name__}; convert it, "
            "for example to int, float, str, list or Tensor"
        )
    if isinstance(value, int) and value.bit_length() > _MAX_INT_BITS:
        raise CheckpointError(
            f"{path}: an int of {value.bit_length():,} bits; a checkpoint holds those of at most "
            f"{_MAX_INT_BITS:,}: keep it as a tensor or as text"
        )
    return value


def _walk(node: Any, path: tuple[str, ...], flat: FlatState) -> None:
    children: Iterable[tuple[Any, Any]]
    children = node.items() if isinstance(node, Mapping) else enumerate(node)
    # torch's state dicts say what they are of, by module.
    metadata = getattr(node, "_metadata", None)
    for module, said in metadata.items() if isinstance(metadata, Mapping) else ():
        if isinstance(said, Mapping) and isinstance(said.get(SETTINGS_KEY), Mapping):
            where = "/".join((*path, str(module)))
            flat.settings[where] = plain(said[SETTINGS_KEY], where)
    for key, item in children:
        at = (*path, str(key).replace("~", "~0").replace("/", "~1"))
        name = "/".join(at)
        if not name.isascii() and name != name.encode(errors="replace").decode():
            raise CheckpointError(f"{name!a}: a key is no valid Unicode; rename it")
        if name in flat.tensors or name in flat.values:
            raise CheckpointError(f"{name}: two keys of the state have this path; rename one")
        if isinstance(item, ShardedTensor):
            flat.tensors[name] = _sharded(name, item)
        elif isinstance(item, Tensor):
            shape = tuple(item.shape)
            flat.tensors[name] = _entry(name, item.dtype, shape, [Piece(item.detach(), (0,) * len(shape))])
        elif isinstance(item, Mapping) or (isinstance(item, list | tuple) and _holds_more(item)):
            _walk(item, at, flat)
        else:
            plain(item, name)
            flat.values[name] = Value(item, node, key)


def _holds_more(items: Sequence[Any]) -> bool:
    return any(
        isinstance(item, Tensor | Mapping) or (isinstance(item, list | tuple) and _holds_more(item))
        for item in items
    )


def _sharded(name: str, tensor: ShardedTensor) -> TensorEntry:
    pieces = []
    for shard in tensor.local_shards():
        sizes = tuple(shard.metadata.shard_sizes)
        if tuple(shard.tensor.shape) != sizes:
            raise CheckpointError(
                f"{name}: a shard has shape {tuple(shard.tensor.shape)} and its metadata say {sizes}"
            )
        pieces.append(Piece(shard.tensor.detach(), tuple(shard.metadata.shard_offsets)))
    metadata = tensor.metadata()
    return _entry(name, metadata.tensor_properties.dtype, tuple(metadata.size), pieces)


def _entry(name: str, dtype: torch.dtype, shape: tuple[int, ...], pieces: list[Piece]) -> TensorEntry:
    if dtype not in _NAMES:
        raise CheckpointError(f"{name}: checkpoints have no tensors of {dtype}; they have {sorted(DTYPES)}")
    for piece in pieces:
        tensor = piece.tensor
        if tensor.dtype is not dtype:
            raise CheckpointError(f"{name}: a shard is {tensor.dtype} and its metadata say {dtype}")
        # DTensors too have no plain memory of their own.
        if tensor.layout is not torch.strided or tensor.is_meta or hasattr(tensor, "placements"):
            raise CheckpointError(
                f"{name}: a {type(tensor).__name__} on {tensor.device} with layout {tensor.layout}; "
                "checkpoints hold dense tensors and ShardedTensors that have been given memory"
            )
    # Shards of no elements hold nothing (pytorch #108869).
    return TensorEntry(_NAMES[dtype], shape, [piece for piece in pieces if piece.tensor.numel()])


def _like(own: Any, read: Any) -> Any:
    if isinstance(own, tuple) and isinstance(read, list):
        pattern = [*own, *[None] * (len(read) - len(own))]
        return tuple(_like(item, value) for item, value in zip(pattern, read, strict=False))
    if isinstance(own, list) and isinstance(read, list):
        pattern = [*own, *[None] * (len(read) - len(own))]
        return [_like(item, value) for item, value in zip(pattern, read, strict=False)]
    return read
