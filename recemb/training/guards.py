"""Checks that stop a run before a bad batch changes any weight.

One NaN in one dense column destroys every weight of a model in one step, and AUC then reads 0.5: so inputs
are checked before the forward pass, the loss before the backward pass, gradients before any
optimizer's step, that of the tables included (:mod:`recemb.training.table_step`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedTensor

from recemb.errors import DataError, NonFiniteError

_UNCHANGED = "no weight was changed by this batch"


@dataclass(frozen=True)
class Place:
    """Where in the run a batch is, for messages: split, 0-based epoch and batch number."""

    split: str
    epoch: int
    batch: int

    def __str__(self) -> str:
        return f"{self.split} batch {self.batch} of epoch {self.epoch}"


def check_inputs(batch: Batch, dense_names: Sequence[str], place: Place) -> None:
    """Refuse dense features or labels that are not finite, and labels other than 0 and 1.

    Raises:
        NonFiniteError: naming the dense columns, or the labels, and the first bad sample.
        DataError: a finite label that is neither 0 nor 1.
    """
    dense, labels = batch.dense_features, batch.labels
    # A sum is one cheap pass; only a suspicious one (which may also be a mere overflow) is looked into.
    if not torch.isfinite(dense.sum()) and not bool(torch.isfinite(dense).all()):
        bad = ~torch.isfinite(dense)
        columns = [dense_names[i] for i in torch.nonzero(bad.any(dim=0)).flatten().tolist()]
        sample = int(torch.nonzero(bad.any(dim=1))[0])
        raise NonFiniteError(
            f"{place}: dense feature {', '.join(columns)} is NaN or infinite (first in sample {sample}); "
            f"{_UNCHANGED}. Prepare the data again: recemb prepare writes finite values only"
        )
    valid = (labels == 0) | (labels == 1)
    if not bool(valid.all()):
        sample = int(torch.nonzero(~valid)[0])
        value = float(labels[sample])
        message = f"{place}: label {value:g} of sample {sample} must be 0 or 1; {_UNCHANGED}"
        raise (DataError if torch.isfinite(labels[sample]) else NonFiniteError)(message)


def check_loss(loss: Tensor, logits: Tensor, learning_rate: float, place: Place) -> float:
    """The loss as a float; :class:`NonFiniteError` when it is NaN or infinite."""
    value = float(loss)
    if value - value != 0:
        bad = int((~torch.isfinite(logits)).sum())
        raise NonFiniteError(
            f"{place}: the loss is {value} ({bad} of {logits.numel()} logits are NaN or infinite, the inputs "
            f"are finite: training diverged); {_UNCHANGED}. Lower --learning_rate (now {learning_rate:g})"
        )
    return value


def check_gradients(
    gradients: Sequence[tuple[str, Tensor]], pooled: KeyedTensor, learning_rate: float, place: Place
) -> None:
    """Refuse gradients that are NaN or infinite, naming the parameters or features that have them.

    Args:
        gradients: name and gradient of parameters.
        pooled: the pooled embeddings, [B, sum of D], with their gradient in ``values().grad``.

    Raises:
        NonFiniteError: naming up to three of the culprits.
    """
    rows = pooled.values().grad
    # A sum propagates NaN and infinities and is the cheapest pass there is (the largest absolute value takes
    # ten times longer on CPU); one that overflowed although every element is finite is cleared below.
    if bool(torch.isfinite(torch.stack([rows.sum(), *(grad.sum() for _, grad in gradients)])).all()):
        return
    columns = torch.split(rows, pooled.length_per_key(), dim=1)
    features = [f"the pooled rows of {key}" for key in pooled.keys()]  # noqa: SIM118 - not a mapping
    named = [*zip(features, columns, strict=True), *gradients]
    bad = [name for name, grad in named if not bool(torch.isfinite(grad).all())]
    if not bad:
        return
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    raise NonFiniteError(
        f"{place}: the gradient of {', '.join(bad[:3])}{more} is NaN or infinite although the loss is "
        f"finite; {_UNCHANGED}. Lower --learning_rate (now {learning_rate:g})"
    )
