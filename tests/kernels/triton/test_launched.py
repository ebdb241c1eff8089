"""Every launch of a step compiles for a GPU that need not be here."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torchrec
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

from tests.gpu.test_collection import collection, features, loss_of
from tests.kernels.apart import compiled_apart
from tests.kernels.triton.fake_gpu import on_gpu
from tests.kernels.triton.launch_keys import Compiled

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has them compiled anyway")


def _step(dtype: torch.dtype, weighted: bool, optimizer: Any) -> None:
    """On tables of all methods."""
    with on_gpu():
        ebc = collection("cuda", weighted).to(dtype)
        if optimizer is not None:
            apply_optimizer_in_backward(optimizer, ebc.parameters(), {"lr": 0.1})
        loss_of(ebc(features(1, weighted=weighted).to("cuda")).values()).backward()


def test_every_launch_of_a_step_compiles_without_spills() -> None:
    """Of collections of all methods: as they are launched, not as someone has listed them."""
    with Compiled() as exact:
        _step(torch.float32, True, torch.optim.Adam)
        _step(torch.float32, False, None)
    assert not any(("PRECISION", "tf32") in launch.constants for launch in exact.found)
    with Compiled() as rounded:
        _step(torch.bfloat16, True, torchrec.optim.RowWiseAdagrad)
    given = sorted(map(asdict, exact.found | rounded.found), key=json.dumps)
    found = compiled_apart("aot_launched.py", json.dumps(given))
    assert found["broken"] == []
    assert found["compiled"] >= len(given) > 90
