"""What waits for a GPU is found on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.triton.no_host_sync import NoHostSync

Reads = Callable[[Tensor], Any]
WAITS: dict[str, Reads] = {
    "bool": lambda x: bool(x.any()),
    "item": lambda x: x[0].item(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 1],
    "repeat": lambda x: torch.repeat_interleave(x),
}
READS = ("tolist", "numpy", "cpu")


def in_module(name: str, read: str) -> Reads:
    """A function of a module that reads a tensor so."""
    scope: dict[str, Any] = {"__name__": name}
    exec(f"def act(x): return x.{read}()", scope)
    act: Reads = scope["act"]
    return act


@pytest.mark.parametrize("act", [*WAITS.values(), *(in_module("recemb_kernels.any", x) for x in READS)])
def test_waiting_is_refused(act: Reads) -> None:
    numbers = torch.arange(3)
    act(numbers)
    with NoHostSync(), pytest.raises(AssertionError, match="waits for the device"):
        act(numbers)
    with NoHostSync([numbers]):
        assert numbers.sum() is not None
    act(numbers)


@pytest.mark.parametrize("read", READS)
def test_others_may_read_and_what_lies_on_the_host_may_be_read(read: str) -> None:
    numbers = torch.arange(3)
    with NoHostSync():
        in_module("triton.runtime.interpreter", read)(numbers)
    with NoHostSync([numbers]):
        in_module("recemb.any", read)(numbers)
