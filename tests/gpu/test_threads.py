"""Threads of one process that look up at once, each in tables of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor

from recemb_kernels.triton_frame.verdict import poll
from tests.gpu.device import needs_gpu
from tests.gpu.test_collection import trained
from tests.gpu.test_graphs import batch, made

pytestmark = [pytest.mark.gpu, needs_gpu]


@pytest.mark.parametrize("graphs", ["0", "1"])
def test_threads_that_tune_at_once(graphs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While kernels are tuned, other threads launch the same ones and capture graphs."""
    from recemb_kernels.tt_gather.triton_variants import multiply_tuned, slice_gradient_tuned

    monkeypatch.setenv("RECEMB_CUDA_GRAPHS", graphs)
    given, together = [batch(seed) for seed in range(8)], Barrier(2)
    expected = trained(made("adagrad"), given, False)
    models = [made("adagrad") for _ in range(2)]
    for tuner in (multiply_tuned, slice_gradient_tuned):
        tuner.cache.clear()
    torch.cuda.synchronize()

    def train(k: int) -> list[Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()):
            together.wait(60)
            return trained(models[k], given, False)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(train, range(2)))
    torch.cuda.synchronize()
    poll(wait=True)
    for weights in found:
        # Other warps, which tuning may choose this time, add up in another order.
        for x, y in zip(weights, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
