"""A batch of bags of ids, and the only place where ids, offsets and weights are checked.

The layout is that of FBGEMM's table-batched embeddings: the bag of feature f and sample b is
``ids[offsets[f * B + b] : offsets[f * B + b + 1]]``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recemb.errors import BatchError
from recemb_kernels.check import MOST, Limits, bags_are_valid
from recemb_kernels.lookup import Ahead
from recemb_kernels.triton_frame.captures import capturing
from recemb_kernels.triton_frame.streams import HandOver
from recemb_kernels.triton_frame.verdict import note, poll

if TYPE_CHECKING:
    from recemb.cache.split import SplitAhead


# Not frozen: torch.compile cannot hand a frozen dataclass over a graph break.
@dataclass(eq=False)
class Bags:
    """The bags of F features over one batch of B samples.

    Args:
        ids: [L] int64, logical row ids.
        offsets: [F * B + 1] int64, rising from 0 to L.
        num_features: F.
        weights: [L] per-sample weights, or ``None``.
        refused: [1] int32 on a GPU, set by the check of ids and offsets that are there: not 0 when the batch
            is bad, of which the host learns later. No weight changes then, and bad ids give 0.
        checked: whether the batch has been checked already.
        handed: on a GPU, the work of the stream that has prepared this batch, which may be another one.
        ahead: the kernels' preparation of this batch, when it was asked for before its look-up.
        split: the same of the cache's streams.
    """

    ids: Tensor
    offsets: Tensor
    num_features: int
    weights: Tensor | None = None
    refused: Tensor | None = None
    checked: bool = False
    handed: HandOver | None = None
    ahead: Ahead | None = None
    split: SplitAhead | None = None

    @property
    def batch_size(self) -> int:
        """B."""
        return (self.offsets.numel() - 1) // self.num_features if self.num_features else 0

    @property
    def prepared_outside(self) -> bool:
        """Whether this was prepared, and the caller is capturing a CUDA graph.

        The graph must not wait for what has been done outside of it, nor read what is gone when it is
        replayed, and is to check and group the ids of every replay. So a look-up in it begins from the ids,
        and nothing is prepared in it.
        """
        return self.handed is not None and capturing()

    @cached_property
    def feature_bounds(self) -> list[int]:
        """F + 1 positions: the ids of feature f are ``ids[bounds[f] : bounds[f + 1]]``."""
        return self.find_bounds()

    def find_bounds(self) -> list[int]:
        """``feature_bounds`` worked out without a lock, for a thread beside.

        In Python 3.11 all batches share the property's, and a forked child would wait for one that is held.
        """
        positions = torch.arange(self.num_features + 1, device=self.offsets.device) * self.batch_size
        bounds: list[int] = self.offsets[positions].tolist()
        return bounds

    def select(self, features: Sequence[int]) -> Bags:
        """The bags of some features, in the order given; no copy when they are neighbours."""
        if list(features) == list(range(self.num_features)):
            return self
        parts = [self._run(first, last) for first, last in runs_of(features)]
        if len(parts) == 1:
            return parts[0]
        offsets, base = [parts[0].offsets[:1]], 0
        for part in parts:
            offsets.append(part.offsets[1:] + base)
            base += part.ids.numel()
        return Bags(
            ids=torch.cat([part.ids for part in parts]),
            offsets=torch.cat(offsets),
            num_features=len(features),
            weights=None
            if self.weights is None
            else torch.cat([part.weights for part in parts if part.weights is not None]),
            refused=self.refused,
        )

    def feature(self, index: int) -> Bags:
        """The bags of one feature (F = 1)."""
        return self._run(index, index)

    def lengths(self) -> Tensor:
        """[F * B] int64, ids in each bag."""
        return self.offsets.diff()

    def _run(self, first: int, last: int) -> Bags:
        if first == 0 and last == self.num_features - 1:
            return self
        begin, end = self.feature_bounds[first], self.feature_bounds[last + 1]
        offsets = self.offsets[first * self.batch_size : (last + 1) * self.batch_size + 1]
        return Bags(
            ids=self.ids[begin:end],
            offsets=offsets - begin if begin else offsets,
            num_features=last - first + 1,
            weights=None if self.weights is None else self.weights[begin:end],
            refused=self.refused,
        )


@dataclass(frozen=True, slots=True)
class LookupTarget:
    """The table that one feature of a :class:`Bags` is looked up in; names appear in error messages."""

    feature: str
    table: str
    num_embeddings: int


class LookupTargets(tuple[LookupTarget, ...]):
    """The targets of a collection, one per feature, and what is worked out once of them."""

    def __reduce__(self) -> tuple[type[LookupTargets], tuple[tuple[LookupTarget, ...]]]:
        # What can be worked out again stays out of copies; arrays of C cannot be pickled.
        return LookupTargets, (tuple(self),)

    @cached_property
    def features(self) -> list[str]:
        """The features' names, in order."""
        return [target.feature for target in self]

    @cached_property
    def limits(self) -> Limits:
        """The tables' numbers of rows, for the native check."""
        return (ctypes.c_int64 * len(self))(*[target.num_embeddings for target in self])

    def limits_on(self, device: torch.device) -> Tensor:
        """[F] the same on a device; copied there once."""
        known = self._limits.get(device)
        if known is None:
            rows = [target.num_embeddings for target in self]
            known = self._limits[device] = torch.tensor(rows, device=device)
        return known

    @cached_property
    def _limits(self) -> dict[torch.device, Tensor]:
        return {}


def check_bags(bags: Bags, targets: Sequence[LookupTarget], *, later: bool = False) -> None:
    """Raise :class:`BatchError` unless every bag is well formed and every id has a row.

    Args:
        bags: the batch.
        targets: one per feature of ``bags``.
        later: do not wait for a GPU: the error of a batch that is there is raised at a later look-up. Kernels
            for GPU skip bad ids and let ``bags.refused`` keep them from stepping; nothing else does.

    Raises:
        BatchError: names feature, table, sample, position and value. Nothing has been computed by then.
    """
    known = targets if isinstance(targets, LookupTargets) else LookupTargets(targets)
    # One native pass says that all is well; only a bad batch, or another device, takes the long way.
    if bags.num_features == len(known) and bags_are_valid(
        bags.ids, bags.offsets, bags.weights, bags.num_features, known.limits
    ):
        return
    if later and bags.ids.is_cuda and known:
        _check_shapes(bags, known)
        check_on_device(bags, known)
        return
    check_structure(bags, known)
    _check_weights(bags, known)
    _check_ids(bags, known)


def check_on_device(bags: Bags, targets: LookupTargets) -> None:
    """:func:`check_bags` without waiting for the device: sets ``bags.refused``.

    Raises:
        BatchError: of an earlier batch.
    """
    poll()
    # Here, as importing recemb imports no Triton.
    from recemb_kernels.triton_frame.plan import check

    rows = targets.limits_on(bags.ids.device)
    weights = None if bags.weights is None else bags.weights.detach().contiguous()
    bags.refused = check(bags.ids.contiguous(), bags.offsets.contiguous(), weights, rows, bags.batch_size)
    # Not what has been prepared of the batch: the mark may be read steps later, when that is long done with.
    seen = Bags(bags.ids, bags.offsets, bags.num_features, weights)
    note(bags.refused, lambda: _found(seen, targets))


def _found(bags: Bags, targets: LookupTargets) -> BatchError:
    """The error of a batch that was refused."""
    try:
        check_structure(bags, targets)
        _check_weights(bags, targets)
        _check_ids(bags, targets)
    except BatchError as error:
        return BatchError(f"{error} (an earlier batch; no kernel has stepped on it)")
    return BatchError("an earlier batch was malformed; it has been changed since, so how is not known")


def check_structure(bags: Bags, targets: Sequence[LookupTarget]) -> None:
    """Raise :class:`BatchError` unless ids are int64, offsets rise from 0 to their number, weights match."""
    _check_shapes(bags, targets)
    if bags_are_valid(bags.ids, bags.offsets, bags.weights, bags.num_features, None):
        return
    lengths = bags.lengths()
    if bool((lengths < 0).any()):
        bag = int((lengths < 0).nonzero()[0])
        feature, sample = divmod(bag, bags.batch_size)
        raise BatchError(
            f"feature {targets[feature].feature!r} (table {targets[feature].table!r}): sample {sample} has "
            f"length {int(lengths[bag])}; lengths must be >= 0 and offsets must not fall"
        )
    first, last = int(bags.offsets[0]), int(bags.offsets[-1])
    if first != 0 or last != bags.ids.numel():
        raise BatchError(
            f"offsets run from {first} to {last} but there are {bags.ids.numel()} ids: lengths must sum to "
            "the number of values, and offsets must start at 0"
        )


def _check_shapes(bags: Bags, targets: Sequence[LookupTarget]) -> None:
    if bags.ids.dtype != torch.int64 or bags.ids.dim() != 1:
        raise BatchError(
            f"ids must be a 1-D int64 tensor, got {bags.ids.dtype} of shape {tuple(bags.ids.shape)}; "
            "build the KeyedJaggedTensor with values=values.long()"
        )
    if bags.offsets.dtype != torch.int64 or bags.offsets.dim() != 1:
        raise BatchError(
            f"offsets must be a 1-D int64 tensor, got {bags.offsets.dtype} of shape "
            f"{tuple(bags.offsets.shape)}; pass offsets.long()"
        )
    others = [bags.offsets] if bags.weights is None else [bags.offsets, bags.weights]
    if any(other.device != bags.ids.device for other in others):
        raise BatchError(
            f"ids are on {bags.ids.device} and offsets or weights on "
            f"{', '.join(str(other.device) for other in others)}; move them to one device"
        )
    if bags.num_features != len(targets):
        raise BatchError(f"batch has {bags.num_features} features, the tables expect {len(targets)}")
    if max(bags.ids.numel(), bags.offsets.numel()) > MOST:
        raise BatchError(
            f"a batch of {bags.ids.numel()} ids in {bags.offsets.numel() - 1} bags is too large: positions "
            f"are counted in 32 bits, so at most {MOST} of each; split the batch"
        )
    if bags.num_features and (not bags.offsets.numel() or (bags.offsets.numel() - 1) % bags.num_features):
        raise BatchError(
            f"offsets have {bags.offsets.numel()} entries, which is not features x batch size + 1 for "
            f"{bags.num_features} features"
        )
    weights = bags.weights
    if weights is not None and (weights.dim() != 1 or weights.numel() != bags.ids.numel()):
        raise BatchError(
            f"weights have shape {tuple(weights.shape)}, one per id ({bags.ids.numel()}) is needed"
        )
    if weights is not None and not weights.is_floating_point():
        raise BatchError(f"weights have dtype {weights.dtype}; per-sample weights must be floating point")


def _check_weights(bags: Bags, targets: Sequence[LookupTarget]) -> None:
    weights = bags.weights
    if weights is None:
        return
    finite = torch.isfinite(weights.detach())
    if not bool(finite.all()):
        position = int((~finite).nonzero()[0])
        raise BatchError(
            f"{_where(bags, targets, position)}: weight {float(weights[position])} is not finite"
        )


def _check_ids(bags: Bags, targets: Sequence[LookupTarget]) -> None:
    if not bags.ids.numel():
        return
    device = bags.ids.device
    rows = torch.tensor([target.num_embeddings for target in targets], device=device)
    per_feature = bags.offsets[torch.arange(len(targets) + 1, device=device) * bags.batch_size].diff()
    limits = rows.repeat_interleave(per_feature, output_size=bags.ids.numel())
    bad = (bags.ids < 0) | (bags.ids >= limits)
    if not bool(bad.any()):
        return
    position = int(bad.nonzero()[0])
    limit = int(limits[position])
    raise BatchError(
        f"{_where(bags, targets, position)}: id {int(bags.ids[position])} is outside [0, {limit}) "
        f"({int(bad.sum())} bad ids in the batch); raise num_embeddings or map such ids to an "
        "out-of-vocabulary row before the lookup"
    )


def _where(bags: Bags, targets: Sequence[LookupTarget], position: int) -> str:
    """Name the feature, table, sample and place in the bag of ``ids[position]``."""
    at = torch.tensor(position, device=bags.offsets.device)
    # right=True skips the empty bags that start at the same offset.
    bag = int(torch.searchsorted(bags.offsets, at, right=True)) - 1
    feature, sample = divmod(bag, bags.batch_size)
    target = targets[feature]
    return (
        f"feature {target.feature!r} (table {target.table!r}), sample {sample}, "
        f"position {position - int(bags.offsets[bag])} of its bag"
    )


def runs_of(features: Sequence[int]) -> list[tuple[int, int]]:
    """Split a list of features into maximal runs of consecutive ones, as (first, last)."""
    runs: list[tuple[int, int]] = []
    for feature in features:
        if runs and feature == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], feature)
        else:
            runs.append((feature, feature))
    return runs
