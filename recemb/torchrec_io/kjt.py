"""KeyedJaggedTensor -> :class:`recemb.bags.Bags`, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.bags import Bags, LookupTarget, LookupTargets, check_bags, check_structure
from recemb.errors import BatchError
from recemb.optim.state import version_of

_INTEGERS = (torch.int32, torch.int64)
_ANY_ID = torch.iinfo(torch.int64).max


def bags_from_kjt(
    features: KeyedJaggedTensor, targets: LookupTargets, is_weighted: bool
) -> tuple[Bags, Tensor | None]:
    """The bags of ``targets``' features, in the order of ``targets``.

    Keys may come in any order and keys without a target are ignored, as in torchrec. Under a variable
    batch size per feature (VBE), short features are padded with empty bags.

    Returns:
        The bags, and the [F, B] map from a sample to its bag that VBE asks for, or ``None``.

    Raises:
        BatchError: duplicate or missing keys, wrong dtypes, malformed lengths, missing weights.
    """
    keys = features.keys()
    in_order = keys == targets.features
    bags = bags_of_keys(features, keys, targets, is_weighted)
    if in_order:  # the engine checks
        return bags, _inverse_indices(features, keys, targets)
    owner = {target.feature: target for target in targets}
    check_structure(bags, [owner.get(key, LookupTarget(key, "none", 0)) for key in keys])
    position = {key: k for k, key in enumerate(keys)}
    selected = bags.select([position[target.feature] for target in targets])
    inverse = _inverse_indices(features, keys, targets)
    if inverse is None and features.variable_stride_per_key():
        selected = _without_padding(selected, _batch_sizes(features, keys, targets))
    return selected, inverse


def check_kjt(features: KeyedJaggedTensor, targets: LookupTargets, is_weighted: bool) -> None:
    """Raise :class:`BatchError` unless a batch can be looked up, ids included.

    Args:
        features: the batch; keys may come in any order, and the ids of keys without a target are not checked.
        targets: one per feature, each feature once.
        is_weighted: whether weights are needed.

    Raises:
        BatchError: as :func:`bags_from_kjt` and :func:`recemb.bags.check_bags`; and for batch sizes per key
            without inverse_indices, which torchrec asks for here. Nothing is copied before.
    """
    keys = features.keys()
    if features.variable_stride_per_key() and features.inverse_indices_or_none() is None:
        raise BatchError(
            "the KeyedJaggedTensor has batch sizes per key (stride_per_key_per_rank) and no inverse_indices, "
            "which sharded tables need to expand them to one batch"
        )
    bags = bags_of_keys(features, keys, targets, is_weighted)
    _inverse_indices(features, keys, targets)
    if keys == targets.features:
        check_bags(bags, targets)
        return
    owner = {target.feature: target for target in targets}
    check_bags(bags, LookupTargets(owner.get(key, LookupTarget(key, "none", _ANY_ID)) for key in keys))


def state_of(features: KeyedJaggedTensor | TensorDict, *, cut: bool = False) -> list[object]:
    """What a batch that has been prepared is known by: its memory, how often that was written to, its use.

    Args:
        features: the batch; of a TensorDict the tensors that its jagged entries are made of.
        cut: whether torchrec cuts it out of a larger one anew each time, its offsets with it.
    """
    if isinstance(features, TensorDict):
        parts = [(entry._values, entry._offsets, entry._lengths) for entry in features.values()]
        seen = [part if part is None else _Seen(part) for entry in parts for part in entry]
        return [*features.keys(), *seen, torch.is_inference_mode_enabled()]
    weights, inverse = features.weights_or_none(), features.inverse_indices_or_none()
    tensors = [features.values()] if cut else [features.values(), features.offsets()]
    if cut or features.variable_stride_per_key():  # which are padded by these
        tensors.append(features.lengths())
    tensors += [tensor for tensor in (weights, inverse and inverse[1]) if tensor is not None]
    learns = weights is not None and weights.requires_grad and torch.is_grad_enabled()
    return [*map(_Seen, tensors), learns, torch.is_inference_mode_enabled()]


class _Seen:
    """Memory as it was, until it is written to; held, so that no other tensor takes its place."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, version_of(tensor)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Seen):
            return NotImplemented
        mine, theirs = self._tensor, other._tensor
        there = mine.data_ptr() == theirs.data_ptr() and mine.shape == theirs.shape
        return there and self._version == other._version


def padded_offsets(features: KeyedJaggedTensor) -> Tensor:
    """[F * B + 1] offsets with every feature padded by empty bags to the longest batch."""
    strides = features.stride_per_key()
    lengths = features.lengths().long()
    padded = lengths.new_zeros(len(strides), max(strides, default=0))
    for row, part in zip(padded, lengths.split(strides), strict=True):
        row[: part.numel()] = part
    return torch.cat([lengths.new_zeros(1), padded.flatten().cumsum(0)])


def bags_of_keys(
    features: KeyedJaggedTensor, keys: Sequence[str], targets: LookupTargets, is_weighted: bool
) -> Bags:
    """All of a batch, in the order of its keys; its numbers are not looked at.

    Raises:
        BatchError: duplicate or missing keys, wrong dtypes or sizes, missing weights.
    """
    if keys != targets.features or len(set(keys)) < len(keys):
        _check_keys(keys, targets)
    values = features.values()
    if values.dtype not in _INTEGERS:
        raise BatchError(
            f"values of the KeyedJaggedTensor have dtype {values.dtype}; ids must be int64 (or int32), "
            "floats above 2**24 have already lost ids"
        )
    weights = features.weights_or_none() if is_weighted else None
    if is_weighted:
        check_weighted(features)
    if features.variable_stride_per_key():
        offsets = _pad_variable_batch(features, keys, targets)
    else:
        offsets = features.offsets()
        expected = len(keys) * features.stride() + 1
        if offsets.numel() != expected:
            raise BatchError(
                f"the KeyedJaggedTensor has {offsets.numel()} offsets; {len(keys)} keys x batch size "
                f"{features.stride()} + 1 = {expected} are needed"
            )
    return Bags(values.long(), offsets.long(), len(keys), weights)


def check_weighted(features: KeyedJaggedTensor) -> None:
    """Raise :class:`BatchError` unless a batch has weights."""
    if features.weights_or_none() is None:
        raise BatchError(
            "the collection was built with is_weighted=True but the KeyedJaggedTensor has no weights; "
            "pass weights=... or build it with is_weighted=False"
        )


def _check_keys(keys: Sequence[str], targets: Sequence[LookupTarget]) -> None:
    present = set(keys)
    if len(present) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BatchError(f"the KeyedJaggedTensor has the key {twice!r} more than once; keys must be unique")
    for target in targets:
        if target.feature not in present:
            raise BatchError(
                f"feature {target.feature!r} of table {target.table!r} is missing from the "
                f"KeyedJaggedTensor, whose keys are {list(keys)}"
            )


def _batch_sizes(
    features: KeyedJaggedTensor, keys: Sequence[str], targets: Sequence[LookupTarget]
) -> dict[str, int]:
    """Of each feature that is looked up; the others' do not matter."""
    strides = dict(zip(keys, features.stride_per_key(), strict=True))
    return {target.feature: strides[target.feature] for target in targets}


def _without_padding(bags: Bags, sizes: Mapping[str, int]) -> Bags:
    """The bags of features of one size, which others that are longer have had padded."""
    size = next(iter(sizes.values()), 0)
    if size == bags.batch_size:
        return bags
    starts = bags.offsets[:-1].view(bags.num_features, -1)[:, :size]
    return replace(bags, offsets=torch.cat([starts.flatten(), bags.offsets[-1:]]))


def _pad_variable_batch(
    features: KeyedJaggedTensor, keys: Sequence[str], targets: Sequence[LookupTarget]
) -> Tensor:
    """Offsets with every feature padded to the longest batch."""
    strides = features.stride_per_key()
    lengths = features.lengths().long()
    if lengths.numel() != sum(strides):
        raise BatchError(
            f"the KeyedJaggedTensor has {lengths.numel()} lengths, its strides per key {strides} ask for "
            f"{sum(strides)}"
        )
    sizes = _batch_sizes(features, keys, targets)
    if features.inverse_indices_or_none() is None and len(set(sizes.values())) > 1:
        raise BatchError(
            f"the batch sizes per key differ ({sizes}) and the KeyedJaggedTensor has no inverse_indices to "
            "expand them to one batch"
        )
    return padded_offsets(features)


def _inverse_indices(
    features: KeyedJaggedTensor, keys: Sequence[str], targets: Sequence[LookupTarget]
) -> Tensor | None:
    """[F, B] bag of each sample in target order, or ``None`` when the batch is not deduplicated."""
    inverse = features.inverse_indices_or_none()
    if inverse is None:
        return None
    names, bags = inverse
    missing = [target.feature for target in targets if target.feature not in names]
    if missing:
        raise BatchError(f"inverse_indices have no entry for feature {missing[0]!r}")
    ordered: Tensor = bags[[names.index(target.feature) for target in targets]]
    sizes = _batch_sizes(features, keys, targets)
    limits = torch.tensor([sizes[target.feature] for target in targets], device=ordered.device)
    bad = (ordered < 0) | (ordered >= limits[:, None])
    if bool(bad.any()):
        row, sample = bad.nonzero()[0].tolist()
        raise BatchError(
            f"inverse_indices of feature {targets[row].feature!r}, sample {sample}: "
            f"{int(ordered[row, sample])} is outside [0, {int(limits[row])}), the feature's batch"
        )
    return ordered
