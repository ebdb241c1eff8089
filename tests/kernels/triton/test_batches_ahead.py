"""More batches are prefetched than are kept: what has been made of those that gave way is ordered too."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from tests.kernels.triton.fake_gpu import on_gpu
from tests.kernels.triton.stream_order import CUDA
from tests.kernels.triton.test_stream_order import GRAPHS, batch, collection, step, train

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")


@GRAPHS
def test_a_third_batch_ahead(graphs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one's look-up prepares it itself, of offsets that the other stream has made."""
    monkeypatch.setenv("RECEMB_CUDA_GRAPHS", graphs)
    with on_gpu() as gpu:
        ebc, beside = collection(), gpu.draw()
        train(ebc, gpu, "beside", 6)
        batches = deque(batch(ebc, seed) for seed in range(4))
        with gpu.stream(beside):
            for given in batches:
                ebc.prefetch(given)
        del given
        while batches:
            step(ebc(batches.popleft()).values())
            with gpu.stream(beside):
                torch.zeros(100, device=CUDA)
