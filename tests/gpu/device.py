"""What the tests of this folder run on: a GPU, or where there is none its stand-in.

That is ``tests.kernels.triton.fake_gpu``: the same code launches the same kernels, which are interpreted,
and replays what it has recorded; the order of its streams is watched. It has no tuning, nccl or timer, and
takes a hundred times as long, so that batches are small there, and tests of minutes run when asked for.
"""

from __future__ import annotations

import os

import pytest
import torch

IS_REAL = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not IS_REAL, reason="needs a CUDA device")
takes_minutes = pytest.mark.skipif(
    not IS_REAL and os.environ.get("RECEMB_STAND_IN") != "1",
    reason="needs a CUDA device, or RECEMB_STAND_IN=1 and minutes of its stand-in",
)

# Samples of a batch.
BATCH = 256 if IS_REAL else 16
