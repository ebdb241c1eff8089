"""What a cache of C rows stores beside its [C, D] weights: sizes and bytes, without torch.

::

    ids     [C] int64     the id in each slot, -1 for none        scores [C] float32   how hot each is
    owners  [K + 1] int64 ids that are not cached, by hash        votes  [K + 1] float32, how hot each is
    steps   [1] int64     training steps so far                   refreshed [1] int64, at the last exchange
    counts  [4] int64     look-ups, hits, promotions, evictions   errors [2] float32, of write-backs

``refreshed`` is below 0 before a row has entered: ``NEVER``, or when that was tried (:func:`tried_at`).
The last owner says whose policy's counters these are, -1 in a state from before that was noted.

None is a scalar: torch cannot gather a ``ShardedTensor`` without dimensions.
"""

from __future__ import annotations

from recemb.spec import TableSpec

# Ids outside the cache that are watched, per cached row; more find hot rows sooner and cost 12 bytes each.
CANDIDATES_PER_ROW = 2
# So that a cache of a few rows sees further than its own size.
LEAST_CANDIDATES = 32
NEVER = -1
# steps, refreshed, counts, errors.
_FIXED_BYTES = 8 + 8 + 4 * 8 + 2 * 4


def num_candidates(table: TableSpec) -> int:
    """K, how many ids outside the cache are watched."""
    wanted = max(LEAST_CANDIDATES, CANDIDATES_PER_ROW * table.cache_rows)
    return min(table.num_embeddings, wanted)


def tried_at(steps: int) -> int:
    """What ``refreshed`` is once a first exchange after ``steps`` has found nothing counted, and back."""
    return NEVER - 1 - steps


def buffer_bytes(table: TableSpec) -> int:
    """Bytes of what the cache of ``table`` keeps beside its weights; 0 without a cache."""
    if not table.cache_rows:
        return 0
    return 12 * (table.cache_rows + num_candidates(table) + 1) + _FIXED_BYTES
