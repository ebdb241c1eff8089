"""What a fused backward needs to know of an optimizer: ``recemb_optim.h``'s kinds, rates and state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor


class Kind(IntEnum):
    """The update rules of ``recemb_optim.h``, in its numbering; 0 writes the gradient out instead."""

    GRADIENT = 0
    SGD = 1
    ADAGRAD = 2
    ROWWISE_ADAGRAD = 3
    ADAM = 4


@dataclass(slots=True)
class Update:
    """One step of one optimizer over the parameters of a call.

    Args:
        kind: the rule.
        lr_decay: Adagrad's; step t has the rate lr / (1 + (t - 1) lr_decay).
        state: per parameter, its first state (float32, contiguous), or empty for none: Adagrad's sum
            [rows, width], row-wise Adagrad's [rows, 1], Adam's first moment.
        state2: per parameter, Adam's second moment, or empty.
        steps: per parameter, its number of steps so far, [] float32; the update adds one. Empty for none.
    """

    kind: Kind
    lr: float
    eps: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    lr_decay: float = 0.0
    state: Sequence[Tensor] = ()
    state2: Sequence[Tensor] = ()
    steps: Sequence[Tensor] = ()
