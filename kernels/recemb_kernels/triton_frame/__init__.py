"""Look-ups on GPU: what the Triton kernels of all ops share, and the group that runs them."""

# Distinct rows of a family that are computed at once, which bounds the memory of a step. Each slice costs its
# launches whether it has rows or not: see kernels/README.md for what that is on a GPU. Here, because planners
# read it where there is no Triton.
MICRO_BATCH_ROWS = 2**18
# Bytes that kernels read at once: parameters begin at multiples of them.
ALIGNED = 16
# Distinct rows that are computed before bags take them, at least.
TURN_ROWS = 2**17


def turn_rows(count: int) -> int:
    """Distinct rows of a batch of ``count`` ids that bags take in one turn, of four at most.

    By the batch alone: the order in which a bag adds its rows up, and so its bits, depend on turns.
    """
    return max(TURN_ROWS, 1 << (-(-count // 4) - 1).bit_length())


def slice_rows(count: int, micro_batch_rows: int) -> int:
    """Distinct rows that are computed at once: a power of two where there are turns, with which they end."""
    return micro_batch_rows if count <= turn_rows(count) else 1 << (micro_batch_rows.bit_length() - 1)
