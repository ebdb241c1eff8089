"""What a fused backward needs to know of an optimizer: ``recemb_optim.h``'s kinds, rates and state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer


class Kind(IntEnum):
    """The update rules of ``recemb_optim.h``, in its numbering; 0 writes the gradient out instead."""

    GRADIENT = 0
    SGD = 1
    ADAGRAD = 2
    ROWWISE_ADAGRAD = 3
    ADAM = 4


@dataclass(slots=True)
class Update:
    """One step of one optimizer over the parameters of a table.

    Args:
        kind: the rule.
        lr_decay: Adagrad's; step t has the rate lr / (1 + (t - 1) lr_decay).
        state: per parameter, its first state (float32, contiguous), or empty for none: Adagrad's sum
            [rows, width], row-wise Adagrad's [rows, 1], Adam's first moment.
        state2: per parameter, Adam's second moment, or empty.
        steps: per parameter, its number of steps so far, [] float32; the update adds one. Empty for none.
        left: positions of the parameters that are not stepped: their gradients are written out, and ``None``
            stands for their states.
    """

    kind: Kind
    lr: float
    eps: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    lr_decay: float = 0.0
    state: Sequence[Tensor | None] = ()
    state2: Sequence[Tensor | None] = ()
    steps: Sequence[Tensor | None] = ()
    left: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Step:
    """A table's step in a backward to come.

    Args:
        make: gives the update, with the rates and states of that moment.
        left: as of the update.
        sources: what it is made of: of each parameter that is stepped its optimizer and itself.
    """

    make: Callable[[], Update]
    left: frozenset[int] = frozenset()
    sources: tuple[tuple[Optimizer, Parameter], ...] = ()


def is_stepped(update: Update | Step | None, k: int) -> bool:
    """Whether parameter ``k`` of the table takes the step, instead of having its gradient written out."""
    return update is not None and k not in update.left
