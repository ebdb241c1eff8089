"""CUDA graph captures: whether one is under way, and what must not run beside one."""

from __future__ import annotations

from threading import RLock

import torch

# Held by a capture of recemb's own, and by each launch of a kernel that may be tuned. A capture begins with a
# wait for the device, and trials are made of such waits, which break another thread's capture; and a tuner is
# one object for all threads. One lock will do: a capture launches such kernels in its own thread, and does
# not run autograd, whose threads this one would wait for.
exclusive = RLock()


def capturing() -> bool:
    """Whether launches are being recorded in a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
