"""Huge pages for memory that is read in no order."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_HUGE_PAGE = 2**21
_MADV_COLLAPSE = 25  # of Linux 6.1; not in `mmap`
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Asked about before every step whose settings have changed.
_moved: WeakIdKeyDictionary = WeakIdKeyDictionary()


def hint_huge_pages(tensor: Tensor) -> None:
    """Ask the kernel to back a large CPU tensor with pages of 2 MB, before anything is written to it.

    A random row of a table of gigabytes on pages of 4 kB costs a miss in the TLB and one in the page table
    besides the row's own: with large ones, a forward from 10 M rows of 16 columns takes 0.8 (B = 4,096) or
    0.7 (B = 65,536) of the time. A hint: where huge pages are off, nothing changes.
    """
    begin, length = _huge_pages_of(tensor)
    if length:
        _libc().madvise(begin, length, mmap.MADV_HUGEPAGE)


def move_to_huge_pages(tensor: Tensor) -> None:
    """Have the kernel move a large CPU tensor, which has been written to, to pages of 2 MB, once.

    Its address stays. Some 0.4 GB move a second: the first step on states of 100 GB waits for minutes. For
    states of optimizers, which torch makes on small pages: steps on an uncompressed table of 10 M rows of 16
    columns then take 0.88-1.0 of the time under row-wise Adagrad, 0.73-0.93 under Adagrad, 0.76-0.85 under
    Adam (two cores of an EPYC, B = 4,096 and 65,536). Where huge pages are off, or others share the memory,
    nothing changes; where the kernel moves none now, it may later.
    """
    begin, length = _huge_pages_of(tensor)
    if not length or (tensor in _moved and _moved[tensor] == begin):
        return
    # Other memory of the same tensor, as after `.data = `, has not been.
    _moved[tensor] = begin
    if tensor.untyped_storage().is_shared() or _are_off():
        return
    if _libc().madvise(begin, length, _MADV_COLLAPSE):
        _libc().madvise(begin, length, mmap.MADV_HUGEPAGE)


def _huge_pages_of(tensor: Tensor) -> tuple[int, int]:
    """Begin and length of the whole huge pages of a tensor that is worth them; the length is 0 of others."""
    size = tensor.numel() * tensor.element_size()
    # A subclass, such as torch.compile's fake tensors, may have no memory.
    if (
        type(tensor) is not Tensor
        or tensor.device.type != "cpu"
        or size < 2 * _HUGE_PAGE
        or not hasattr(mmap, "MADV_HUGEPAGE")
    ):
        return 0, 0
    begin = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    return begin, (tensor.data_ptr() + size - begin) // _HUGE_PAGE * _HUGE_PAGE


def _are_off() -> bool:
    """Whether the machine's owner has turned them off, which does not keep the kernel from moving pages."""
    try:
        return "[never]" in _ENABLED.read_text()
    except OSError:  # no such kernel
        return True


@cache
def _libc() -> Any:
    library = ctypes.CDLL(None)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return library
