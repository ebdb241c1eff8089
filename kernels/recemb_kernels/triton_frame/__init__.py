"""Look-ups on GPU: what the Triton kernels of all ops share, and the group that runs them."""

# Distinct rows of a family that are computed at once, which bounds the memory of a step. Each slice costs its
# launches whether it has rows or not: see kernels/README.md for what that is on a GPU. Here, because planners
# read it where there is no Triton.
MICRO_BATCH_ROWS = 2**18
# Bytes that kernels read at once: parameters begin at multiples of them.
ALIGNED = 16
