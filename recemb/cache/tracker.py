"""Which ids outside the cache are hot, in a fixed number of counters, without sorting and without a host.

Ids are hashed into K buckets, each of which holds a majority vote (Boyer and Moore, 1981; MV-Sketch, Tang,
Huang and Lee, INFOCOM 2019): an id adds its weight to the vote of a bucket that it owns and takes it from
that of another; when the vote falls below zero, the heaviest of the ids that brought it there takes the
bucket over. An id that is more than half of what its bucket sees ends up as its owner, and its vote never
exceeds what it was seen. With K = N nothing collides and votes are exact counts. How ids are numbered decides
between equals alone.

Every function works on tensors of one device, reads nothing back from it, and gives the same result for the
same batch whatever the device. On the CPU it takes time in proportion to the batch, not to the counters.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Fibonacci hashing (Knuth, 6.4); int64 products wrap.
_MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64
# In which a batch's weights are added up by id. As many whatever the batch: a GPU's holds positions that a
# CPU's leaves out. Either few ids share one, or the heavy ones stand out still.
NUM_CELLS = 1 << 16


def buckets_of(ids: Tensor, num_buckets: int, num_embeddings: int) -> Tensor:
    """[L] int64 in [0, K]: the bucket of each id, its own where there is one for each of the N ids.

    A negative id, which stands for no id, goes to the spare bucket K.
    """
    if num_buckets >= num_embeddings:
        mixed = ids
    else:
        mixed = ids * _MULTIPLIER
        mixed = ((mixed >> 20) ^ mixed) % num_buckets
    return torch.where(ids < 0, num_buckets, mixed)


def add(counters: Tensor, index: Tensor, weights: Tensor) -> None:
    """Add a batch's weights [L] to the counters that ``index`` [L] names.

    A GPU adds in any order. That changes nothing about whole numbers, but would about sums with a counter
    that has decayed, and two runs would then exchange different rows: there the batch is summed on its own
    first.
    """
    if counters.is_cpu:
        counters.index_add_(0, index, weights)
    else:
        counters += torch.zeros_like(counters).index_add_(0, index, weights)


def vote(owners: Tensor, votes: Tensor, buckets: Tensor, ids: Tensor, weights: Tensor) -> None:
    """Count a batch of ids, in place.

    Ids of one batch that meet in a bucket vote at once. One that is lost goes to the heaviest of the others,
    with what it was left below zero by, or with that id's own weight where that is less.

    Args:
        owners: [K + 1] int64, -1 for none.
        votes: [K + 1] float32.
        buckets: [L] int64, of :func:`buckets_of`.
        ids: [L] int64; one that stands for no id has weight 0.
        weights: [L] float32 >= 0.
    """
    own, weights = owners[buckets] == ids, weights.to(votes.dtype)
    add(votes, buckets, torch.where(own, weights, -weights))
    _hand_over(owners, buckets, ids, weights, (votes[buckets] < 0) & ~own)
    held = torch.empty_like(votes)
    held[buckets] = 0
    held.index_add_(0, buckets, torch.where(owners[buckets] == ids, weights, 0.0))
    now = votes[buckets]
    votes[buckets] = torch.where(now < 0, torch.minimum(-now, held[buckets]), now)


def see(owners: Tensor, votes: Tensor, buckets: Tensor, ids: Tensor, step: int) -> None:
    """Note ids as seen at ``step``, in place: under ``lru`` a bucket holds the last id that it saw.

    Arguments as in :func:`vote`; votes are of :func:`times_seen`.
    """
    times = times_seen(ids >= 0, step).to(votes.dtype)
    # Another feature of the table may have seen later ones in this step.
    votes.scatter_reduce_(0, buckets, times, "amax")
    # Equals of before too: a place is rounded, into the next step at times.
    _give(owners, buckets, ids, (times > 0) & (times == votes[buckets]))


def times_seen(present: Tensor, step: int) -> Tensor:
    """[L] float32: the step and, behind the point, the place among these ids, from its start; 0 for no id.

    Those that were hit and those that were not are placed apart, and so are those of each feature.
    float32 tells 128 places of a batch apart at step 100,000, and 8 at step 1,000,000.
    """
    # Among those that are there: the same whether positions without an id are left out or not.
    places = present.cumsum(0) / (present.sum() + 1)
    return torch.where(present, step + places, 0.0)


def _hand_over(owners: Tensor, buckets: Tensor, ids: Tensor, weights: Tensor, heirs: Tensor) -> None:
    """Give buckets to the heaviest of their ``heirs`` [L] bool, the smallest of equals; others keep theirs.

    Weights of equal ids are added up in cells, without sorting: two that share one are both taken for heavier
    than they are.
    """
    cells = cells_of(ids)
    weights = torch.where(heirs, weights, 0.0)
    sums = weights.new_zeros(NUM_CELLS).index_add_(0, cells, weights)[cells]
    sums = sums.masked_fill(~heirs, -1.0)
    most = sums.new_empty(owners.shape).scatter_reduce_(0, buckets, sums, "amax", include_self=False)
    _give(owners, buckets, ids, heirs & (sums == most[buckets]))


def _give(owners: Tensor, buckets: Tensor, ids: Tensor, wins: Tensor) -> None:
    """Give buckets to the smallest of the ids that ``wins`` [L] bool names; others keep their owner."""
    # The spare bucket, the last, is given what it has.
    to = torch.where(wins, buckets, owners.numel() - 1)
    owners.scatter_reduce_(0, to, torch.where(wins, ids, owners[-1]), "amin", include_self=False)


def cells_of(ids: Tensor) -> Tensor:
    """[L] int64: the cell in which the weight of each id is added up."""
    cells = ids * _MULTIPLIER
    return ((cells >> 29) ^ cells) & (NUM_CELLS - 1)
