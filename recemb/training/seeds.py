"""Everything random in a run comes from ``--seed``, through one named stream per purpose.

Separate streams keep runs paired: the dense layers of a compressed model and of its uncompressed twin start
from the same weights and see the same batches, however many random numbers their tables draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch


def derive_seed(seed: int, purpose: str, index: int = 0) -> int:
    """A seed in [0, 2^63) for ``purpose`` (``tables``, ``dense_layers``, ``shuffle`` and an epoch)."""
    digest = hashlib.blake2b(f"recemb/{purpose}/{index}/{seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded(seed: int, purpose: str) -> Iterator[None]:
    """Draw from the stream of ``purpose`` inside; the caller's generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, purpose))
        yield


@contextmanager
def deterministic_algorithms(device: str) -> Iterator[None]:
    """Ask torch for kernels whose result does not depend on the order in which threads finish.

    On CUDA a kernel without such a form only warns: it is better to train than to refuse.
    """
    before = torch.get_deterministic_debug_mode()
    memory: Any = import_module("torch.utils.deterministic")
    fill_before = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=device == "cuda")
    # Filling every torch.empty with NaN is a debugging aid that costs a pass over each new tensor.
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        memory.fill_uninitialized_memory = fill_before
