"""Which ids outside the cache are hot, in a fixed number of counters, without sorting and without a host.

Ids are hashed into K buckets, each of which holds a majority vote (Boyer and Moore, 1981; MV-Sketch, Tang,
Huang and Lee, INFOCOM 2019): an id adds its weight to the vote of a bucket that it owns, takes it from that
of another, and takes the bucket over when the vote falls below zero. An id that is more than half of what its
bucket sees ends up as its owner, and its vote never exceeds what it was seen. With K = N nothing collides and
votes are exact counts.

Every function works on tensors of one device, reads nothing back from it, and gives the same result for the
same batch whatever the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Fibonacci hashing (Knuth, 6.4); int64 products wrap.
_MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64
_NOBODY = torch.iinfo(torch.int64).max


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

    Ids of one batch that meet in a bucket vote at once; of those that could take it over the smallest does.

    Args:
        owners: [K + 1] int64, -1 for none.
        votes: [K + 1] float32.
        buckets: [L] int64, of :func:`buckets_of`.
        ids: [L] int64; one that stands for no id has weight 0.
        weights: [L] float32 >= 0.
    """
    held = owners[buckets]
    own = held == ids
    add(votes, buckets, torch.where(own, weights, -weights))
    after = votes[buckets]
    lost = after < 0
    # Positions of one bucket write the same value, so their order does not matter.
    owners.scatter_(0, buckets, held.masked_fill(lost, _NOBODY))
    owners.scatter_reduce_(0, buckets, ids.masked_fill(~lost | own, _NOBODY), "amin")
    votes.scatter_(0, buckets, after.abs())


def see(owners: Tensor, votes: Tensor, buckets: Tensor, ids: Tensor, step: int) -> None:
    """Note ids as seen at ``step``, in place: under ``lru`` a bucket holds the last id that it saw.

    Of several in one batch that is the smallest. Arguments as in :func:`vote`.
    """
    present = ids >= 0
    owners.scatter_(0, buckets, torch.where(present, _NOBODY, -1))
    owners.scatter_reduce_(0, buckets, ids, "amin")
    votes.scatter_(0, buckets, torch.where(present, float(step), 0.0).to(votes.dtype))
