"""Splits a batch on the CPU into ids that are cached and ids that are not, in one pass, and counts both.

Cached ids are found in a hash table that is made when the cached rows change: 21 to 43 bytes a row beside
the sorted keys. With Zipf ids most searches end among the few hot rows, which the processor's caches hold.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from recemb_kernels.build import load
from recemb_kernels.native import attempt

_MOST = 2**31 - 1


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_features", "batch", "num_ids", "threads")),
        *((name, ctypes.c_void_p) for name in ("ids", "offsets", "base", "table")),
        ("shift", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("out_ids", "out_offsets", "order", "bounds")),
    )


class _Count(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scores", "slots", "slot_weights")),
        ("num_slots", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("owners", "votes")),
        *((name, ctypes.c_int64) for name in ("num_buckets", "num_embeddings")),
        *((name, ctypes.c_void_p) for name in ("ids", "id_weights")),
        ("num_ids", ctypes.c_int64),
    )


@dataclass(frozen=True, eq=False)
class Parts:
    """A batch split in two.

    Attributes:
        ids: [L] int64, slots and ids of the F features, then ids of the k cached ones.
        offsets: [(F + k) * B + 1] int64.
        bounds: F + k + 1 positions of the features' ids in ``ids``.
        order: [L] int64, where each of ``ids`` was in the batch; ``None`` unless asked for.
    """

    ids: Tensor
    offsets: Tensor
    bounds: list[int]
    order: Tensor | None


class Splitter:
    """Cached rows of some features, to split batches by.

    Args:
        library: :func:`library`.
        keys: [C] int64, distinct.
        slots: [C] int64.
        bases: per feature what is added to its ids to make keys, -1 for a feature without a cache.
    """

    def __init__(self, library: ctypes.CDLL, keys: Tensor, slots: Tensor, bases: Sequence[int]) -> None:
        self._library = library
        self._bases = (ctypes.c_int64 * len(bases))(*bases)
        self._num_cached = sum(base >= 0 for base in bases)
        # At most three quarters full, and never full.
        bits = max(1, (keys.numel() * 4 // 3).bit_length())
        self._table = torch.empty(2**bits, 2, dtype=torch.int64, device="cpu")
        library.recemb_split_index(
            keys.data_ptr(), slots.data_ptr(), keys.numel(), self._table.data_ptr(), 64 - bits
        )
        self._template = _Call(
            num_features=len(bases),
            base=ctypes.addressof(self._bases),
            table=self._table.data_ptr(),
            shift=64 - bits,
        )

    @staticmethod
    def of(keys: Tensor, slots: Tensor, bases: Sequence[int]) -> Splitter | None:
        """A splitter, or ``None`` where there can be none: other devices or types, no compiler, compiling."""
        if torch.compiler.is_compiling() or not keys.is_cpu or keys.numel() > _MOST:
            return None
        if not _are_int64(keys, slots) or keys.numel() != slots.numel():
            return None
        return attempt("cache_split", lambda: Splitter(library(), keys, slots, bases))

    def __call__(
        self, ids: Tensor, offsets: Tensor, batch_size: int, want_order: bool, threads: int | None = None
    ) -> Parts:
        """Split a batch that has been checked.

        Args:
            ids: [L] int64.
            offsets: [F * B + 1] int64.
            batch_size: B.
            want_order: whether to make ``Parts.order``, to bring other numbers of the batch into its order.
            threads: how many; torch's number when ``None``.

        Raises:
            TypeError: ids or offsets that are not int64.
        """
        if not _are_int64(ids, offsets):
            raise TypeError(f"ids and offsets must be int64, not {ids.dtype} and {offsets.dtype}")
        ids, offsets = ids.contiguous(), offsets.contiguous()
        features = self._template.num_features + self._num_cached
        bounds = (ctypes.c_int64 * (features + 1))()
        out_ids = torch.empty_like(ids)
        out_offsets = offsets.new_empty(features * batch_size + 1)
        order = torch.empty_like(ids) if want_order else None
        call = _Call.from_buffer_copy(self._template)
        call.batch, call.num_ids = batch_size, ids.numel()
        call.threads = torch.get_num_threads() if threads is None else threads
        call.ids, call.offsets = ids.data_ptr(), offsets.data_ptr()
        call.out_ids, call.out_offsets = out_ids.data_ptr(), out_offsets.data_ptr()
        call.order = None if order is None else order.data_ptr()
        call.bounds = ctypes.addressof(bounds)
        self._library.recemb_split(ctypes.addressof(call))
        return Parts(out_ids, out_offsets, list(bounds), order)


@dataclass(frozen=True, eq=False)
class Counters:
    """What is counted of one table.

    Attributes:
        scores: [C] float32, how hot each slot is.
        owners: [K + 1] int64, the id that holds each bucket.
        votes: [K + 1] float32.
        num_embeddings: N.
    """

    scores: Tensor
    owners: Tensor
    votes: Tensor
    num_embeddings: int


def count(
    counters: Counters, slots: Tensor, misses: Tensor, weights: tuple[Tensor, Tensor] | None = None
) -> bool:
    """Add slots that were hit to ``scores``, and let ids that missed vote, in place.

    The same as torch's operations in ``HotRowCache.observe``, sums in the same order.

    Args:
        counters: of the table.
        slots: [H] int64; a negative one stands for none.
        misses: [M] int64 ids; likewise.
        weights: what each counts for, [H] and [M]; or ``None`` for 1.

    Returns:
        ``False`` where nothing has been done: other devices and dtypes, no compiler, torch.compile,
        no memory.
    """
    held = (counters.scores, counters.owners, counters.votes)
    floats = (counters.scores, counters.votes)
    if torch.compiler.is_compiling() or not all(t.is_cpu and t.is_contiguous() for t in held):
        return False
    if not (slots.is_cpu and misses.is_cpu) or any(t.dtype is not torch.float32 for t in floats):
        return False
    if not _are_int64(counters.owners, slots, misses):
        return False
    compiled = attempt("cache_split", library)
    if compiled is None:
        return False
    slots, misses = slots.contiguous(), misses.contiguous()
    each = [None, None] if weights is None else [w.float().contiguous() for w in weights]
    call = _Count(
        scores=counters.scores.data_ptr(),
        slots=slots.data_ptr(),
        slot_weights=None if each[0] is None else each[0].data_ptr(),
        num_slots=slots.numel(),
        owners=counters.owners.data_ptr(),
        votes=counters.votes.data_ptr(),
        num_buckets=counters.owners.numel() - 1,
        num_embeddings=counters.num_embeddings,
        ids=misses.data_ptr(),
        id_weights=None if each[1] is None else each[1].data_ptr(),
        num_ids=misses.numel(),
    )
    lacks: int = compiled.recemb_split_count(ctypes.addressof(call))
    return not lacks


def _are_int64(*tensors: Tensor) -> bool:
    """Whether C++ may read them by pointer."""
    return all(tensor.dtype is torch.int64 for tensor in tensors)


@cache
def library() -> ctypes.CDLL:
    """The compiled library.

    Raises:
        KernelUnavailableError: it cannot be compiled here.
    """
    own, shared = Path(__file__).parent, Path(__file__).parents[1] / "digit_tree"
    sources = [*(own / name for name in ("cpu.cpp", "count.cpp")), shared / "buffer.cpp"]
    compiled = load("cache_split", sources, {})
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    for name, structure in (("call", _Call), ("count", _Count)):
        size = getattr(compiled, f"recemb_split_{name}_size")
        size.argtypes, size.restype = (), integer
        if size() != ctypes.sizeof(structure):
            raise RuntimeError(f"the {name} structures of the C++ files and of cache_split differ")
    compiled.recemb_split_index.argtypes = (pointer, pointer, integer, pointer, integer)
    compiled.recemb_split_index.restype = None
    compiled.recemb_split.argtypes, compiled.recemb_split.restype = (pointer,), None
    compiled.recemb_split_count.argtypes, compiled.recemb_split_count.restype = (pointer,), integer
    compiled.recemb_split_fail.argtypes, compiled.recemb_split_fail.restype = (integer,), None  # for tests
    return compiled
